import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_topkast.pattern import Pattern, index_dtype, pack_bits, slot_sources, unpack_bits


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def random_masks(shape, seed, active_share=0.3, backward_share=0.6):
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return draw < active_share, draw < backward_share


@given(shape=shapes, seed=st.integers(0, 10**6), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_masks_round_trip(shape, seed, shares):
    active, backward = random_masks(shape, seed, *sorted(shares))
    pattern = Pattern.from_masks(active, backward)
    assert pattern.shape == tuple(shape)
    assert torch.equal(pattern.active_mask(), active)
    assert torch.equal(pattern.backward_mask(), backward)


@given(shape=shapes, seed=st.integers(0, 10**6))
def test_each_row_holds_its_active_entries_first_and_ascending(shape, seed):
    active, backward = random_masks(shape, seed)
    pattern = Pattern.from_masks(active, backward)
    for row in range(shape[0]):
        columns = pattern.columns[pattern.row_offsets[row] : pattern.row_offsets[row + 1]].tolist()
        count = int(pattern.active_counts[row])
        assert columns[:count] == active[row].nonzero().flatten().tolist()
        assert columns[count:] == (backward & ~active)[row].nonzero().flatten().tolist()


@given(shape=shapes, seed=st.integers(0, 10**6))
def test_slot_sources_follow_each_weight(shape, seed):
    old = Pattern.from_masks(*random_masks(shape, seed))
    new = Pattern.from_masks(*random_masks(shape, seed + 1))
    old_places, sources = old.flat_index().tolist(), slot_sources(old, new).tolist()
    for place, source in zip(new.flat_index().tolist(), sources):
        assert source == (old_places.index(place) if place in old_places else -1)


@pytest.mark.parametrize(("in_features", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_columns_take_16_bits_where_they_fit(in_features, dtype):
    mask = torch.zeros(1, in_features, dtype=torch.bool)
    mask[0, -1] = True
    pattern = Pattern.from_masks(mask, mask)
    assert pattern.columns.dtype == dtype
    assert pattern.flat_index().tolist() == [in_features - 1]


def test_a_full_row_at_the_16_bit_limit_is_counted():
    mask = torch.ones(2, 2**15, dtype=torch.bool)
    pattern = Pattern.from_masks(mask, mask)
    assert pattern.active_counts.tolist() == [2**15, 2**15]
    assert pattern.active_slots().all()


def test_index_dtype():
    assert index_dtype(2**31) == torch.int64


@given(bits=st.lists(st.booleans(), max_size=70))
def test_bits_round_trip(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_bits(packed, len(bits)), mask)
