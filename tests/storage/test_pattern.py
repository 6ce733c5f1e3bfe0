import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_topkast.storage.pattern import Pattern, index_dtype, pack_bits, slot_sources, spread_blocks, unpack_bits


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


blocks = st.tuples(st.integers(1, 4), st.integers(1, 4))


def random_masks(shape, seed, active_share=0.3, backward_share=0.6, block_size=(1, 1)):
    """Masks of A and B for a weight of `shape` blocks."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    draw = draw.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return draw < active_share, draw < backward_share


@given(shape=shapes, seed=st.integers(0, 10**6), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), block_size=blocks)
def test_masks_round_trip(shape, seed, shares, block_size):
    active, backward = random_masks(shape, seed, *sorted(shares), block_size)
    pattern = Pattern.from_masks(active, backward, block_size)
    assert pattern.shape == active.shape and pattern.numel == active.numel()
    assert (pattern.active, pattern.stored) == (active.sum(), backward.sum())
    assert torch.equal(pattern.active_mask(), active)
    assert torch.equal(pattern.backward_mask(), backward)


@given(shape=shapes, seed=st.integers(0, 10**6))
def test_the_rows_of_the_active_set_come_first_and_ascend(shape, seed):
    active, backward = random_masks(shape, seed)
    pattern = Pattern.from_masks(active, backward)
    for row, members in enumerate(torch.cat([active, backward & ~active])):
        columns = pattern.columns[pattern.row_offsets[row] : pattern.row_offsets[row + 1]]
        assert columns.tolist() == members.nonzero().flatten().tolist()
    assert active.flatten()[pattern.flat_index()].tolist() == [slot < pattern.active for slot in range(pattern.stored)]


@given(shape=shapes, seed=st.integers(0, 10**6), block_size=blocks)
def test_blocks_hold_their_values_row_by_row(shape, seed, block_size):
    active, backward = random_masks(shape, seed, block_size=block_size)
    pattern = Pattern.from_masks(active, backward, block_size)
    theta = torch.arange(pattern.numel).view(pattern.shape)
    values = theta.flatten()[pattern.flat_index()].view(-1, *block_size)
    rows = torch.arange(shape[0]).repeat(2).repeat_interleave(pattern.row_offsets.diff())
    for block, row, column in zip(values, rows.tolist(), pattern.columns.tolist()):
        corner = theta[row * block_size[0] :, column * block_size[1] :]
        assert torch.equal(block, corner[: block_size[0], : block_size[1]])


@given(shape=shapes, seed=st.integers(0, 10**6), block_size=blocks)
def test_slot_sources_follow_each_weight(shape, seed, block_size):
    old = Pattern.from_masks(*random_masks(shape, seed, block_size=block_size), block_size)
    new = Pattern.from_masks(*random_masks(shape, seed + 1, block_size=block_size), block_size)
    old_places, sources = old.flat_index().tolist(), slot_sources(old, new).tolist()
    for place, source in zip(new.flat_index().tolist(), sources):
        assert source == (old_places.index(place) if place in old_places else -1)


@given(shape=shapes, seed=st.integers(0, 10**6), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), block_size=blocks)
def test_the_walk_by_columns_has_the_blocks_of_a_in_their_order(shape, seed, shares, block_size):
    active, backward = random_masks(shape, seed, *sorted(shares), block_size)
    pattern = Pattern.from_masks(active, backward, block_size)
    walk, stored = pattern.walk_by_columns(), pattern.columns.numel()
    begins, rows, places = (part.tolist() for part in walk.split([shape[1] + 1, stored, stored]))
    grid = active[:: block_size[0], :: block_size[1]]
    by_rows = grid.nonzero().tolist()  # as the blocks of A are stored
    by_columns = grid.T.nonzero().flip(1).tolist()
    assert walk.dtype == torch.int32
    assert rows[: len(by_rows)] == [row for row, _ in by_columns]
    assert places[: len(by_rows)] == [by_rows.index(block) for block in by_columns]
    assert begins == [0, *grid.sum(0).cumsum(0).tolist()]


@pytest.mark.parametrize(("sides", "needed"), [((16, 48), True), ((32, 16), True), ((16, 8), False), ((1, 1), False)])
def test_patterns_of_blocks_for_tensor_cores_keep_their_walk(sides, needed):
    mask = torch.ones(2 * sides[0], sides[1], dtype=torch.bool)
    pattern = Pattern.from_masks(mask, mask, sides)
    assert pattern.fills_tiles == needed
    assert torch.equal(pattern.column_walk, pattern.walk_by_columns()) if needed else pattern.column_walk is None


@pytest.mark.parametrize(("in_features", "dtype"), [(2**15, torch.int16), (2**15 + 1, torch.int32)])
def test_columns_take_16_bits_where_they_fit(in_features, dtype):
    mask = torch.zeros(1, in_features, dtype=torch.bool)
    mask[0, -1] = True
    pattern = Pattern.from_masks(mask, mask)
    assert pattern.columns.dtype == dtype
    assert pattern.flat_index().tolist() == [in_features - 1]


def test_index_dtype():
    assert index_dtype(2**31) == torch.int64


@given(bits=st.lists(st.booleans(), max_size=70))
def test_bits_round_trip(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_bits(packed, len(bits)), mask)


def test_spread_blocks():
    mask = torch.tensor([[True, False]])
    assert spread_blocks(mask, (2, 3)).tolist() == [[True] * 3 + [False] * 3] * 2


def test_masks_that_are_not_whole_blocks_are_refused():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, 0] = True
    with pytest.raises(ValueError, match="not made of whole blocks of 2×1"):
        Pattern.from_masks(mask, mask, (2, 1))
    mask[1, 0] = True
    Pattern.from_masks(mask, mask, (2, 1))
