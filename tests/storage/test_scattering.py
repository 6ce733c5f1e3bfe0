"""The order in which scattered blocks take the outputs of a layer."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_topkast import sparsify
from hf_topkast.block_order import inverse, row_stride
from hf_topkast.ops import BACKENDS, runs_one_token
from hf_topkast.ops.reordering import reorder
from hf_topkast.storage import from_grid, reordered, to_grid


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
def test_a_grid_has_every_row_once_and_goes_back(height, blocks, matrices):
    count = blocks * height
    stride = row_stride(count, height, scatter=True)
    assert math.gcd(stride, count) == 1
    theta = torch.arange(matrices * count * 3).view(-1, 3)
    grid = to_grid(theta, stride, matrices)
    assert torch.equal(from_grid(grid, stride, matrices), theta)
    for expert, own in zip(grid.chunk(matrices), theta.chunk(matrices)):
        for place, row in enumerate(expert):
            assert torch.equal(row, own[place * stride % count])


def test_blocks_of_one_row_and_those_of_neighbours_keep_their_order():
    assert row_stride(96, 16, scatter=False) == row_stride(96, 1, scatter=True) == 1
    theta = torch.randn(96, 64)
    assert to_grid(theta, 1).data_ptr() == from_grid(theta, 1).data_ptr() == theta.data_ptr()


@pytest.mark.parametrize("count", [64, 128, 288, 576, 768, 1024, 2304, 3072, 4096, 11008])
@pytest.mark.parametrize("height", [4, 16])
def test_the_rows_of_a_block_come_from_everywhere(count, height):
    blocks = (torch.arange(count) * row_stride(count, height, scatter=True) % count).view(-1, height)
    gaps = blocks.sort(dim=1).values.diff(dim=1)
    assert int(gaps.min()) > 1 and int(gaps.max()) <= 2.5 * count / height  # even ones are of count / height
    former = [len(set(rows.tolist())) for rows in blocks // height]  # blocks that they would be in
    assert min(former) >= 0.75 * min(height, count // height)


def test_an_order_is_differentiable_in_every_way():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reorder(reorder(x, 3), inverse(3, 10)), x)
    for dim in (0, 1):
        order = torch.arange(x.shape[dim]) * 7 % x.shape[dim]
        assert torch.equal(reordered(x, 7, dim), x.index_select(dim, order))
    assert torch.equal(reorder(x, 7), reordered(x, 7))
    assert torch.autograd.gradcheck(lambda x: reorder(x, 3), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: reorder(x, 3).square(), x)


def make_layer(bias=True):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 48, bias=bias)).double()
    blocks = {"block_size": (4, 8), "scatter_blocks": True}
    return dense[0], sparsify(copy.deepcopy(dense), density=0.3, target_modules=["0"], **blocks)[0]


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_the_masked_dense_one_does(bias):
    dense, layer = make_layer(bias)
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert torch.equal(layer.weight.detach(), dense.weight.detach() * layer.active_mask)
    x, mine = (torch.randn(5, 32, dtype=torch.float64).requires_grad_() for _ in range(2))
    mine.data.copy_(x.data)
    alpha = (dense.weight.detach() * layer.active_mask).requires_grad_()
    expected = nn.functional.linear(x, alpha, dense.bias)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    y = layer(mine)
    (y * weights).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mine.grad, x.grad)
    at_slots = layer.to_grid(alpha.grad).flatten()[layer.pattern.flat_index()]
    torch.testing.assert_close(layer.values.grad, at_slots)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("bias", [False, True])
def test_one_token_sees_weights_and_bias_that_change(bias):
    dense, layer = make_layer(bias)
    dense, layer, x = dense.float(), layer.float(), torch.randn(1, 32)
    with torch.no_grad():
        assert runs_one_token(x, 32, "auto") or "cpu" not in BACKENDS
        for _ in range(3):
            alpha = layer.dense_weight() * layer.active_mask
            torch.testing.assert_close(layer(x), nn.functional.linear(x, alpha, layer.bias))
            layer.values.mul_(1.5)
            if bias:
                layer.bias.add_(1)


def test_one_token_refuses_or_casts_a_bias_as_many_do():
    layer = make_layer()[1].float()
    x = torch.randn(2, 32)
    with torch.no_grad():
        layer.bias = nn.Parameter(layer.bias.double())
        assert layer(x[:1]).dtype == layer(x).dtype == torch.float32
        layer.bias = nn.Parameter(torch.zeros(1))
        for tokens in (x[:1], x):
            with pytest.raises(ValueError, match="a bias of shape"):
                layer(tokens)


def test_a_layer_pickled_by_an_earlier_version_has_its_rows_in_order():
    layer = sparsify(nn.Sequential(nn.Linear(32, 48)), density=0.3, target_modules=["0"])[0]
    x = torch.randn(3, 32)
    expected = layer(x)
    del layer.row_stride
    assert torch.equal(layer(x), expected)


def test_a_layer_used_in_inference_mode_first_can_be_trained():
    _, layer = make_layer()
    x = torch.randn(5, 32, dtype=torch.float64)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()


def test_transforms_see_the_order():
    _, layer = make_layer()
    x = torch.randn(5, 32, dtype=torch.float64)
    expected = layer(x).detach()
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), layer.weight)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x[0]), layer.weight)
    torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x).detach(), expected)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == expected.shape
    assert torch.equal(layer(x), expected)  # nothing of them is kept
    assert layer.to("meta")(x.to("meta")).shape == expected.shape


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_the_order(clone):
    _, layer = make_layer()
    other, x = clone(layer), torch.randn(5, 32, dtype=torch.float64)
    assert other.row_stride == layer.row_stride != 1
    assert torch.equal(other(x), layer(x)) and "scattered" in repr(other)


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_may_be_changed_in_place(bias):
    """As Falcon adds its attention to what the MLP made."""
    torch.manual_seed(0)
    settings = {"density": 0.3, "block_size": 4, "scatter_blocks": True, "target_modules": ["0"]}
    model = sparsify(nn.Sequential(nn.Linear(64, 64, bias=bias)), **settings)
    x = torch.randn(3, 64)
    (2 * model(x) + 1).square().sum().backward()
    expected, model[0].values.grad = model[0].values.grad, None
    model(x).mul_(2).add_(1).square().sum().backward()
    assert torch.equal(model[0].values.grad, expected)
