"""The C++ passes against the same functions of torch's operations: every bit, for any shape, block and type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_topkast import native
from hf_topkast.storage import passes
from hf_topkast.storage import pattern as patterns
from hf_topkast.storage.distributed import carry, set_digest
from hf_topkast.storage.pattern import Pattern
from hf_topkast.storage.rearrangement import rearrange
from hf_topkast.storage.reservoir import assemble_theta, outside


pytestmark = pytest.mark.skipif(native.extension is None, reason="built without a compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True, params=[1, 2], ids=lambda count: f"{count} threads")
def shared_work(request, threads, monkeypatch):
    """Rows and layers are shared by threads whatever their size."""
    threads(request.param)
    monkeypatch.setattr(native, "GRAIN", 1)


def by_both(function, *arguments):
    """The result of the extension and that of torch's operations."""
    return getattr(passes, function.__name__)(*arguments), function.__wrapped__(*arguments)


def assert_same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got, want) or torch.equal(got.view(torch.uint8), want.view(torch.uint8))


sizes = {
    "shape": st.tuples(st.integers(1, 40), st.integers(1, 90)),
    "block_size": st.sampled_from([(1, 1), (2, 1), (1, 3), (4, 2), (16, 16)]),
    "shares": st.tuples(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    "seed": st.integers(0, 10**6),
}


def masks(shape, block_size, shares, seed):
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    draw = patterns.spread_blocks(draw, block_size)
    low, high = sorted(shares)
    return draw < low, draw < high


@given(**sizes)
@settings(deadline=None)
def test_structure_masks_and_digest(shape, block_size, shares, seed):
    active, backward = masks(shape, block_size, shares, seed)
    got = Pattern.from_masks(active, backward, block_size)
    with native.torch_only():
        want = Pattern.from_masks(active, backward, block_size)
    assert_same(got.row_offsets, want.row_offsets)
    assert_same(got.columns, want.columns)
    assert_same(*by_both(set_digest, got))
    for whole, mask in ((False, active), (True, backward)):
        assert_same(patterns.mask_of(got, whole), mask)


@given(**sizes, dtype=st.sampled_from(DTYPES))
@settings(deadline=None)
def test_weights_come_apart_and_together(shape, block_size, shares, seed, dtype):
    active, backward = masks(shape, block_size, shares, seed)
    pattern = Pattern.from_masks(active, backward, block_size)
    theta = torch.randn(active.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values, want = by_both(patterns.take_slots, theta, pattern)
    assert_same(values, want)
    reservoir, want = by_both(outside, theta, backward)
    assert_same(reservoir, want)
    assert_same(assemble_theta(values, pattern, reservoir), theta)
    assert_same(*by_both(assemble_theta, values, pattern, reservoir[:0]))


@given(**sizes, other=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES))
@settings(deadline=None)
def test_slots_and_what_moves_with_them(shape, block_size, shares, seed, other, dtype):
    old = Pattern.from_masks(*masks(shape, block_size, shares, seed), block_size)
    new = Pattern.from_masks(*masks(shape, block_size, shares[::-1], other), block_size)
    theta = torch.randn(new.shape).to(dtype)
    rest = new.backward_mask()
    for keeps_rest in (True, False):
        for got, want in zip(*by_both(rearrange, theta, rest, old, new, keeps_rest), strict=True):
            assert_same(got, want)
    sources = patterns.slot_sources(old, new)
    if old.stored:
        numbers = torch.randn(old.stored).to(dtype)
        for fresh in (torch.tensor(0.5, dtype=dtype), torch.randn(new.stored).to(dtype)):
            assert_same(*by_both(carry, numbers, sources, fresh))


@given(numel=st.integers(0, 300), share=st.floats(0, 1), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_bits(numel, share, seed):
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < share
    packed, want = by_both(patterns.pack_bits, mask)
    assert_same(packed, want)
    assert_same(*by_both(patterns.unpack_bits, packed, numel))


@given(**sizes)
@settings(deadline=None)
def test_sizes_of_sets(shape, block_size, shares, seed):
    active, backward = masks(shape, block_size, shares, seed)
    for pair in ((active, backward), (backward, active)):
        got, want = by_both(patterns.set_sizes, *pair)
        assert got == want


def test_under_another_default_device():
    theta = torch.randn(20, 30)
    mask, packed = theta > 0, patterns.pack_bits(theta > 0)
    with torch.device("meta"):
        pattern = Pattern.from_masks(mask, mask)
        results = patterns.pack_bits(mask), patterns.unpack_bits(packed, 600).view(20, 30), pattern.backward_mask()
        digest, values = set_digest(pattern), patterns.take_slots(theta, pattern)
        assert_same(assemble_theta(values, pattern, outside(theta, mask)), theta)
    for got, want in zip(results, (packed, mask, mask), strict=True):
        assert_same(got, want)
    assert_same(digest, set_digest.__wrapped__(pattern))


def test_a_reservoir_is_written_where_it_rests():
    theta = torch.randn(20, 30)
    mask = theta > 0
    pattern = Pattern.from_masks(mask, mask)
    values, rest = torch.empty(int(mask.sum())), torch.empty(int((~mask).sum()))
    _, got, resting = rearrange(theta, mask, pattern, pattern, True, (values, rest))
    assert got is values and resting is rest
    assert_same(values, theta[mask])
    assert_same(rest, theta[~mask])
    for other in (rest[1:], rest.bfloat16(), rest.repeat_interleave(2)[::2]):
        before = other.clone()
        assert_same(rearrange(theta, mask, pattern, pattern, True, (values, other))[2], rest)
        assert torch.equal(other, before)


def test_strided_masks_and_weights():
    theta = torch.randn(30, 20).T
    active, backward = theta > 1, theta > 0
    pattern = Pattern.from_masks(active, backward)
    assert_same(*by_both(outside, theta, backward))
    assert_same(*by_both(patterns.take_slots, theta, pattern))
    for got, want in zip(*by_both(patterns.row_structure, active, backward, (1, 1), torch.int16), strict=True):
        assert_same(got, want)


def test_many_columns_take_32_bits():
    theta = torch.randn(3, 2**15 + 9)
    pattern = Pattern.from_masks(theta > 1, theta > 0)
    assert pattern.columns.dtype == torch.int32
    assert_same(pattern.backward_mask(), theta > 0)
    assert_same(*by_both(set_digest, pattern))


@pytest.mark.parametrize("member", [(0, 0), (1, 3), (3, 7)])
def test_masks_of_torn_blocks_are_refused(member):
    backward = torch.ones(4, 8, dtype=torch.bool)
    active = torch.zeros_like(backward)
    active[member] = True
    for masks in ((active, backward), (active, active)):
        with pytest.raises(ValueError, match="not made of whole blocks of 2×4"):
            Pattern.from_masks(*masks, (2, 4))


@pytest.mark.parametrize("change", ["column", "negative column", "offset", "sources"])
def test_structures_that_point_outside_are_errors_and_no_reads(change):
    theta = torch.randn(6, 8)
    pattern = Pattern.from_masks(theta > 1, theta > -1)
    sources = patterns.slot_sources(pattern, pattern)
    if change == "sources":
        with pytest.raises(IndexError):
            carry(torch.randn(pattern.stored), sources + 10**6, torch.zeros(()))
        return
    if change == "offset":
        pattern.row_offsets[3] += 1000
    else:
        pattern.columns[-1] = 10_000 if change == "column" else -10_000
    with pytest.raises(IndexError, match="6×8 point outside"):
        pattern.backward_mask()
    with pytest.raises(IndexError, match="6×8 point outside"):
        patterns.take_slots(theta, pattern)


def test_what_is_traced_or_differentiated_is_left_to_torch():
    mask = torch.rand(9) < 0.5
    packed = patterns.pack_bits(mask)
    values = torch.randn(4, requires_grad=True)
    assert carry(values, torch.tensor([3, -1]), torch.zeros(())).requires_grad
    meta = patterns.pack_bits(mask.to("meta"))
    assert meta.is_meta and meta.shape == packed.shape
    batched = torch.vmap(patterns.pack_bits)(mask[None])
    assert torch.equal(batched[0], packed)
