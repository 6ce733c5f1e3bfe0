import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_topkast import native
from hf_topkast.native import torch_only
from hf_topkast.sets import selection
from hf_topkast.sets.selection import block_norms, check_finite, set_size, spread_mask, top_mask


def by_stable_sort(scores: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.sort(scores.flatten(), descending=True, stable=True).indices[:count]] = True
    return mask.view_as(scores)


@given(
    seed=st.integers(0, 10**6),
    numel=st.integers(1, 200),
    share=st.floats(0, 1),
    levels=st.sampled_from([1, 2, 5, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_equals_a_stable_sort(seed, numel, share, levels, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randint(0, levels, (numel,), generator=generator) / 7).to(dtype)
    count = round(share * numel)
    mask = top_mask(scores, count)
    assert int(mask.sum()) == count
    assert torch.equal(mask, by_stable_sort(scores, count))


@given(seed=st.integers(0, 10**6), small=st.integers(0, 60), large=st.integers(0, 60))
def test_sets_are_nested(seed, small, large):
    small, large = sorted((small, large))
    scores = torch.randint(0, 4, (6, 10), generator=torch.Generator().manual_seed(seed)).float()
    assert not (top_mask(scores, small) & ~top_mask(scores, large)).any()


def test_ties_go_to_the_lower_flat_index():
    scores = torch.tensor([[1.0, 2.0, 1.0], [2.0, 1.0, 1.0]])
    assert top_mask(scores, 4).tolist() == [[True, True, True], [True, False, False]]


@given(numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), place=st.data())
def test_counting_finds_the_same_threshold(numbers, place):
    """What a GPU's sets are chosen by."""
    scores = torch.tensor(numbers)
    count = place.draw(st.integers(1, len(numbers)))
    got = selection._kth_largest_by_counting(scores, count)
    assert got.tolist() == [sorted(numbers, reverse=True)[count - 1]]


def test_counting_among_many(monkeypatch):
    scores = torch.randn(10**5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(selection, "_kth_largest", selection._kth_largest_by_counting)
    with torch_only():
        for count in (1, 20_000, 10**5 - 1):
            assert torch.equal(top_mask(scores, count), by_stable_sort(scores, count))


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_spread_is_even(seed, share):
    candidates = torch.rand(8, 9, generator=torch.Generator().manual_seed(seed)) < 0.5
    count = round(share * int(candidates.sum()))
    mask = spread_mask(candidates, count)
    assert int(mask.sum()) == count and not (mask & ~candidates).any()
    ranks = mask.flatten()[candidates.flatten()].nonzero().flatten()
    gaps = torch.cat([ranks, candidates.sum()[None]]).diff()  # the last one reaches to the end
    assert count == 0 or (ranks[0] == 0 and gaps.max() - gaps.min() <= 1)


@given(numel=st.integers(1, 10**6), density=st.floats(1e-9, 1))
def test_set_size(numel, density):
    size = set_size(numel, density)
    assert 1 <= size <= numel
    assert abs(size - density * numel) <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_without_order_are_refused(bad):
    theta = torch.ones(3, 4)
    check_finite(theta, "h.0.c_fc")
    theta[1, 2] = bad
    with pytest.raises(ValueError, match=r"'h\.0\.c_fc': 1 of its 12 weights"):
        check_finite(theta, "h.0.c_fc")


@pytest.mark.parametrize("block_size", [(1, 1), (4, 1), (2, 3), (8, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_block_norms(block_size, dtype):
    theta = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    norms = block_norms(theta, block_size)
    assert norms.dtype == torch.float32
    for row, parts in enumerate(theta.split(block_size[0], 0)):
        for column, block in enumerate(parts.split(block_size[1], 1)):
            torch.testing.assert_close(norms[row, column], block.double().norm().float())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("block_size", [(4, 4), (1, 8), (16, 2), (32, 32)])
def test_block_norms_are_the_same_in_cpp(block_size, count, threads, monkeypatch):
    threads(count)
    monkeypatch.setattr(native, "GRAIN", 1)
    theta = torch.randn(320, 256, generator=torch.Generator().manual_seed(0))
    with torch_only():
        expected = block_norms(theta, block_size)
    assert torch.equal(block_norms(theta, block_size), expected)
    assert torch.equal(block_norms(theta.T.contiguous().T, block_size), expected)


@pytest.mark.parametrize("at_once", [1, 500, 2**16])
@pytest.mark.parametrize("block_size", [(1, 1), (4, 1), (1, 3), (16, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_block_norms_in_pieces_are_those_at_once(block_size, dtype, at_once, monkeypatch):
    theta = torch.randn(80, 18, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, pieces, norms_of = block_norms(theta, block_size), [], selection._norms_at_once  # in C++ or not
    monkeypatch.setattr(selection, "NORMS_AT_ONCE", at_once)
    monkeypatch.setattr(selection, "_norms_at_once", lambda part, size: pieces.append(part) or norms_of(part, size))
    with torch_only():
        assert torch.equal(block_norms(theta, block_size), whole)
    assert torch.equal(torch.cat(pieces), theta)
    assert all(part.numel() <= at_once or len(part) == block_size[0] for part in pieces)
    assert len(pieces) > 1 or at_once > theta.numel()
