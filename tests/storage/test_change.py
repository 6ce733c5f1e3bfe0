"""Other sets for a layer, matrix by matrix, against what a layer of whole masks stores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_topkast.layers import ExpertStack, TopKastGroupedLinear
from hf_topkast.storage import Change, Pattern, blocks_of, pack_bits, pack_part, unpack_part


EXPERTS, OUT, IN = 3, 6, 10  # 60 weights each: the bits of the second begin inside a byte


def draw_sets(seed, sizes, block_size=(1, 1)):
    """Masks of all experts, of these sizes in blocks for each."""
    generator = torch.Generator().manual_seed(seed)
    height, width = block_size
    masks = []
    for active, backward in sizes:
        places = torch.randperm(OUT * IN // (height * width), generator=generator)
        pair = torch.zeros(2, len(places), dtype=torch.bool)
        pair[0, places[:active]] = pair[1, places[:backward]] = True
        blocks = pair.view(2, OUT // height, IN // width)
        masks.append(blocks.repeat_interleave(height, 1).repeat_interleave(width, 2))
    return [torch.cat(mask) for mask in zip(*masks)]


def make_layer(masks, place="same", block_size=(1, 1)):
    owner = nn.Module()
    generator = torch.Generator().manual_seed(5)
    owner.weight = nn.Parameter(torch.randn(EXPERTS, OUT, IN, generator=generator))
    stack = ExpertStack(owner, "weight", stores_transposed=False)
    return TopKastGroupedLinear(stack, *masks, reservoir_device=place, block_size=block_size)


def stored(layer):
    kept = ("values", "row_offsets", "columns", "reservoir", "unvisited", "sets_digest")
    return {name: getattr(layer, name).detach() for name in kept}


ALIKE, OTHERS = [(12, 24), (3, 9), (5, 15)], [(10, 30), (4, 4), (6, 15)]


@pytest.mark.parametrize("place", ["same", "cpu", "disk"])
@pytest.mark.parametrize("block_size", [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("sizes", [ALIKE, OTHERS], ids=["in place", "other sizes"])
def test_it_is_what_a_new_layer_stores(place, block_size, sizes):
    numel = block_size[0] * block_size[1]
    before, after = ([(max(1, a // numel), max(1, b // numel)) for a, b in each] for each in (ALIKE, sizes))
    first, second = draw_sets(0, before, block_size), draw_sets(1, after, block_size)
    layer, new = make_layer(first, place, block_size), make_layer(second, place, block_size)
    theta, values = layer.theta(), layer.values
    gradient, moment = torch.rand(layer.numel), torch.rand(layer.numel)
    slots = layer.pattern.flat_index()
    values.grad, state = gradient[slots], [moment[slots]]
    places = [tensor.data_ptr() for tensor in stored(layer).values()]
    left = 0
    with torch.no_grad(), Change(layer, after) as change:
        change.carry(state[0], lambda sources, values: torch.tensor(7.0), lambda new: state.__setitem__(0, new))
        pairs = zip(*(mask.chunk(EXPERTS) for mask in second))
        for number, masks in enumerate(pairs):
            left += change.give(change.former.matrix(number), *masks)
    assert layer.values is values and torch.equal(layer.theta(), theta)
    new.unvisited.copy_(pack_bits(~first[1] & ~second[0]))
    for name, tensor in stored(new).items():
        assert torch.equal(stored(layer)[name], tensor), name
    assert left == int((first[0] & ~second[0]).sum())
    stays, slots = first[1].flatten(), layer.pattern.flat_index()
    assert torch.equal(values.grad, torch.where(stays, gradient, 0.0)[slots])
    assert torch.equal(state[0], torch.where(stays, moment, 7.0)[slots])
    if sizes is ALIKE:
        assert places == [tensor.data_ptr() for tensor in stored(layer).values()]
    layer.check_sets()
    assert layer.assignments % 2 == 0


@pytest.mark.parametrize(("sizes", "changed"), [(ALIKE, 2), (OTHERS, 0)], ids=["in place", "other sizes"])
def test_an_error_between_two_matrices_leaves_a_whole_layer(sizes, changed):
    first, second = draw_sets(0, ALIKE), draw_sets(1, sizes)
    layer = make_layer(first)
    theta = layer.theta()
    with pytest.raises(KeyError), torch.no_grad(), Change(layer, sizes) as change:
        for number in range(2):
            change.give(change.former.matrix(number), *(mask.chunk(EXPERTS)[number] for mask in second))
        raise KeyError
    rows = torch.arange(EXPERTS * OUT)[:, None] < changed * OUT
    expected = [torch.where(rows, new, old) for new, old in zip(second, first)]
    assert torch.equal(layer.pattern.active_mask(), expected[0])
    assert torch.equal(layer.pattern.backward_mask(), expected[1])
    assert torch.equal(layer.theta(), theta) and layer.assignments % 2 == 0
    layer.reassign(*second)
    assert torch.equal(layer.pattern.active_mask(), second[0]) and torch.equal(layer.theta(), theta)


def test_matrices_are_those_of_the_layer():
    masks = draw_sets(0, ALIKE)
    layer = make_layer(masks)
    layer.input_norms = torch.rand(EXPERTS, IN)
    for moment in (layer.stored(), layer.moment()):
        for number in range(EXPERTS):
            matrix = moment.matrix(number)
            rows = slice(number * OUT, (number + 1) * OUT)
            assert torch.equal(matrix.theta, layer.theta()[rows])
            assert torch.equal(matrix.scored(), layer.scored()[rows])
            expected = Pattern.from_masks(*(mask[rows] for mask in masks))
            assert all(torch.equal(*pair) for pair in zip(matrix.pattern[:2], expected[:2]))
    assert [blocks_of(*pair, (1, 1)) for pair in zip(*(mask.chunk(EXPERTS) for mask in masks))] == ALIKE


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_bits_of_parts_are_those_of_the_whole(sizes, seed):
    mask = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed)) < 0.5
    packed, begin = torch.zeros(-(-len(mask) // 8), dtype=torch.uint8), 0
    for part in mask.split(sizes):
        first, own = pack_part(part, begin)
        packed[first : first + len(own)] |= own
        begin += len(part)
    assert torch.equal(packed, pack_bits(mask))
    begin = 0
    for part in mask.split(sizes):
        assert torch.equal(unpack_part(packed, begin, len(part)), part)
        begin += len(part)
