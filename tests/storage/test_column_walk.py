"""A walk of other sets gives wrong gradients without a word: a layer has that of its own sets, or hands out none."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel
from toy_models import choose_sets

from hf_topkast.layers.linear import TopKastLinear
from hf_topkast.ops import reference
from hf_topkast.storage import Pattern, spread_blocks


def choose_blocks(seed, share=0.5):
    """Sets of 4 × 6 blocks, 8 in A and 12 (or `share`) in B."""
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed))
    return [spread_blocks(mask, (16, 16)) for mask in choose_sets(scores, 1 / 3, share)]


def make_layer(seed, share=0.5):
    torch.manual_seed(seed)
    return TopKastLinear(nn.Linear(96, 64), *choose_blocks(seed, share), "reference", block_size=(16, 16))


def has_own_walk(layer) -> bool:
    """Whether the layer hands out a walk, which then has to be that of its sets."""
    pattern = layer.pattern
    if pattern.column_walk is None:
        return False
    assert torch.equal(pattern.column_walk, pattern.walk_by_columns())
    return True


CHANGES = {
    "reassign": lambda layer, other: layer.reassign(other.active_mask, other.backward_mask),
    "load": lambda layer, other: layer.load_state_dict(other.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_follows_the_sets_in_its_place(change):
    layer, other = make_layer(0), make_layer(1)
    walk, place, former = layer.column_walk, layer.column_walk.data_ptr(), layer.column_walk.clone()
    change(layer, other)
    assert has_own_walk(layer)
    assert not torch.equal(walk, former)
    assert layer.column_walk is walk and walk.data_ptr() == place  # where a CUDA graph reads it


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("share", [1 / 3, 1.0])
def test_sets_of_another_size(change, share):
    layer, other = make_layer(0), make_layer(1, share)
    walk = layer.column_walk
    change(layer, other)
    assert has_own_walk(layer)
    assert layer.column_walk is walk and walk.numel() == 7 + 2 * layer.columns.numel()


def test_assigned_sets_leave_the_former_ones_to_what_still_reads_them():
    layer, x = make_layer(0), torch.randn(5, 96, requires_grad=True)
    alpha, y = layer.weight.detach(), layer(x)
    walk, former = layer.column_walk, layer.column_walk.clone()
    layer.load_state_dict(make_layer(1).state_dict(), assign=True)
    assert has_own_walk(layer)
    assert torch.equal(walk, former)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, alpha.sum(0).expand(5, -1))


def test_it_is_not_saved_and_goes_where_the_layer_goes():
    layer = make_layer(0)
    assert "column_walk" not in layer.state_dict()
    moved = copy.deepcopy(layer).to("meta")
    assert moved.column_walk.is_meta and moved.pattern.column_walk is moved.column_walk
    moved.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    emptied = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    averaged = AveragedModel(layer).module
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half(), moved, emptied, averaged):
        assert has_own_walk(twin)
        assert twin.column_walk.dtype == torch.int32
        twin.reassign(*choose_blocks(2))
        assert has_own_walk(twin)


def write_in_place(layer, other):
    for tensor, new in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        tensor.copy_(new)


def share_and_change(layer, other):
    layer.load_state_dict(other.state_dict(), assign=True)
    other.reassign(*choose_blocks(2))


def lose_numbers(layer, other):
    layer.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor, new in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
            tensor.data.copy_(new)  # which no tensor notices


@pytest.mark.parametrize("change", [write_in_place, share_and_change, lose_numbers])
def test_none_of_sets_that_something_else_has_changed(change):
    layer, other = make_layer(0), make_layer(1)
    change(layer, other)
    assert not has_own_walk(layer)
    assert not has_own_walk(layer.to(torch.bfloat16))
    assert has_own_walk(copy.deepcopy(layer))
    layer.reassign(*choose_blocks(3))
    assert has_own_walk(layer)


def test_a_shallow_copy_leaves_pending_losses():
    layer, x = make_layer(0), torch.randn(5, 96, requires_grad=True)
    y = layer(x)
    twin = copy.copy(layer)
    y.sum().backward()
    assert has_own_walk(layer) and has_own_walk(twin)


def test_layers_that_offer_their_columns_keep_it():
    layer = make_layer(0)
    layer.offer_columns()
    assert has_own_walk(layer)
    layer.row_offsets.add_(0)
    assert not has_own_walk(layer)


def test_layers_without_one_keep_no_former_sets():
    dense = nn.Linear(6, 4)
    layer, other = (TopKastLinear(dense, *choose_sets(torch.rand(4, 6), 1 / 3, 0.5)) for _ in range(2))
    assert layer.column_walk is None
    layer.load_state_dict(other.state_dict(), assign=True)
    assert layer._noted == ()


def test_a_load_of_other_tensors_leaves_it(monkeypatch):
    layer = make_layer(0)
    monkeypatch.setattr(Pattern, "walk_by_columns", None)
    layer.load_state_dict({"bias": torch.ones(64)}, strict=False)
    assert layer.pattern.column_walk is layer.column_walk


def test_layers_made_in_inference_mode():
    with torch.inference_mode():
        layer = make_layer(0)
        assert has_own_walk(layer)
        layer.reassign(*choose_blocks(2, 1.0))
        assert has_own_walk(layer)


@pytest.mark.parametrize("compiled", [False, True])
def test_none_of_sets_that_stand_in_for_those_of_the_layer(compiled, monkeypatch):
    handed_out, multiply = [], reference.grad_input

    def grad_input(dy, values, pattern):
        handed_out.append(pattern.column_walk is not None)
        if handed_out[-1]:
            assert torch.equal(pattern.column_walk, pattern.walk_by_columns())
        return multiply(dy, values, pattern)

    monkeypatch.setattr(reference, "grad_input", grad_input)
    layer, x = make_layer(0), torch.randn(5, 96, requires_grad=True)
    call = torch.compile(functional_call, backend="aot_eager") if compiled else functional_call
    states = [make_layer(1).state_dict(), make_layer(2, 1.0).state_dict(), {"columns": 5 - layer.columns}]
    for state in (*states, dict(layer.named_parameters())):
        call(layer, state, (x,)).sum().backward()
    assert handed_out == [False, False, False, True]
    assert has_own_walk(layer)
    layer._noted = ()  # as a load leaves it under FSDP2
    call(layer, {}, (x,)).sum().backward()
    assert not handed_out[-1]
