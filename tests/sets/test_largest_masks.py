"""The choice of the largest by counting bits, against the one that sorts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_topkast import native
from hf_topkast.sets.selection import largest_masks


pytestmark = pytest.mark.skipif(native.extension is None, reason="built without a compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=[1, 2, 3], ids=lambda count: f"{count} threads")
def shared_work(request, threads, monkeypatch):
    threads(request.param)
    monkeypatch.setattr(native, "GRAIN", 1)


def assert_as_sorted(scores, counts, by_row, magnitudes):
    got = largest_masks(scores, counts, by_row, magnitudes)
    want = largest_masks.__wrapped__(scores, counts, by_row, magnitudes)
    assert [int(mask.count_nonzero()) for mask in got] == list(counts)
    for mask, other in zip(got, want, strict=True):
        assert mask.dtype == torch.bool and torch.equal(mask, other)


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 70)),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=2),
    dtype=st.sampled_from(DTYPES),
    by_row=st.booleans(),
    magnitudes=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None)
def test_any_scores(shape, levels, shares, dtype, by_row, magnitudes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randint(-levels, levels + 1, shape, generator=generator) / 7).to(dtype)
    scores = scores * 10.0 ** torch.randint(-4, 4, shape, generator=generator)
    scores = scores.to(dtype).clamp(-6e4, 6e4)
    counts = tuple(round(share * scores.numel()) for share in shares)
    assert_as_sorted(scores, counts, by_row, magnitudes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
def test_many_scores(dtype, by_row):
    for shape in ((300, 500), (2, 2**17 + 3)):  # with digits of 16 bits, all together and in each row
        scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for magnitudes in (False, True):
            assert_as_sorted(scores, (scores.numel() // 10, scores.numel() // 3), by_row, magnitudes)
        members = torch.where(scores > 1, scores, -1.0).to(dtype)  # as methods mark what they may not choose
        assert_as_sorted(members, (int((scores > 1).sum()) // 2, scores.numel() // 2), by_row, False)
        assert_as_sorted(torch.zeros_like(scores), (scores.numel() // 2,), by_row, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_that_mislead(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1000, 1000, generator=generator)
    flat, odd = scores.view(-1), scores.clone()
    odd.view(-1)[::17] = 9.0  # all that is looked at
    sorted_, few = flat.sort().values.view_as(scores), (flat * 3).round().view_as(scores)
    zeros = torch.where(torch.rand(scores.shape, generator=generator) < 0.9, 0.0, scores)
    for numbers in (scores, odd, 100 + scores / 1000, sorted_, few, zeros):
        numbers = numbers.to(dtype)
        for counts in ((100_000, 200_000), (1, 999_999), (59_000, 95_000), (500_000,)):
            assert_as_sorted(numbers, counts, False, True)


@pytest.mark.parametrize("magnitudes", [False, True])
def test_zeros_tie_whatever_their_sign_and_extremes_are_in_order(magnitudes):
    tiny, huge = 1e-45, torch.finfo(torch.float32).max
    scores = torch.tensor([0.0, -0.0, tiny, -tiny, huge, -huge, float("inf"), 0.0, -0.0, 1.0, -1.0, -float("inf")])
    for count in range(scores.numel() + 1):
        assert_as_sorted(scores, (count,), False, magnitudes)


def test_all_none_and_beyond():
    scores = torch.randn(5, 7)
    everything, nothing = largest_masks(scores, (36, -1), False)
    assert everything.all() and not nothing.any()


def test_columns_of_a_larger_tensor():
    scores = torch.randn(40, 60)
    assert_as_sorted(scores[:, 10:30], (100, 300), True, True)
    assert_as_sorted(scores.T, (100, 300), False, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitudes", [False, True])
def test_rows_like_and_unlike_the_ones_before(dtype, magnitudes):
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(40, 1200, generator=generator)
    scales = 10.0 ** torch.randint(-3, 3, (40, 1), generator=generator)
    for scores in (alike, alike * scales, (alike * 3).round(), torch.where(alike > 1, alike, -1.0)):
        scores = scores.to(dtype)
        for counts in ((4_800, 9_600), (40, 47_990), (7, 24_000), (0, 48_000)):
            assert_as_sorted(scores, counts, True, magnitudes)
