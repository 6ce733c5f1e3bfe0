import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from hf_topkast.layers.linear import TopKastConv1D, TopKastLinear
from hf_topkast.ops import masked_linear
from hf_topkast.storage import spread_blocks


one_token = pytest.importorskip("hf_topkast.ops.one_token", exc_type=ImportError)


def make_layer(kind=TopKastLinear, bias=True, block_size=(1, 1), shape=(40, 24)):
    torch.manual_seed(0)
    dense = Conv1D(*shape) if kind is TopKastConv1D else nn.Linear(*shape[::-1], bias=bias)
    if dense.bias is not None:
        nn.init.normal_(dense.bias)
    scores = torch.rand(shape[0] // block_size[0], shape[1] // block_size[1])
    return kind(dense, *(spread_blocks(scores < share, block_size) for share in (0.3, 0.5)), block_size=block_size)


def check(layer, x=None):
    """That the layer takes the short way, to the same bits as the long one."""
    x = torch.randn(1, 1, layer.matrix_shape[1], dtype=layer.values.dtype) if x is None else x
    with torch.no_grad():
        long = masked_linear(x, layer.values, layer.pattern, layer.bias, layer.backend)
        assert torch.equal(layer(x), long)
    assert isinstance(layer._one_token, one_token.OneToken)
    alpha = layer.to_rows(layer.weight.detach())
    torch.testing.assert_close(long, nn.functional.linear(x, alpha, layer.bias), rtol=1e-4, atol=1e-5)
    return layer._one_token


@pytest.mark.parametrize("kind", [TopKastLinear, TopKastConv1D])
@pytest.mark.parametrize("block_size", [(1, 1), (4, 1), (8, 8)])
def test_equals_the_product_of_many(kind, block_size):
    check(make_layer(kind, block_size=block_size))


def test_without_bias():
    check(make_layer(bias=False))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 1, 24)])
def test_shapes(shape):
    check(make_layer(), torch.randn(shape))
    check(make_layer(), torch.randn(*shape, 2)[..., 1])


def test_changes_in_place_count():
    layer = make_layer()
    first = check(layer)
    with torch.no_grad():
        layer.values.mul_(-2)
        layer.bias.add_(1)
    assert check(layer) is first


def test_other_sets_of_the_same_and_of_other_sizes():
    layer = make_layer()
    check(layer)
    theta = layer.theta()
    for share in (0.5, 0.02, 0.5, 1.0):
        mask = torch.rand(layer.matrix_shape) < share
        layer.reassign(mask, mask, theta)
        check(layer)


def test_a_state_of_other_sizes():
    layer, other = make_layer(), make_layer()
    check(layer)
    mask = torch.rand(layer.matrix_shape) < 0.7
    other.reassign(mask, mask)
    layer.load_state_dict(other.state_dict())
    check(layer)


def test_a_parametrised_bias():
    class Twice(nn.Module):
        def forward(self, tensor):
            return 2 * tensor

    layer = make_layer()
    check(layer)
    parametrize.register_parametrization(layer, "bias", Twice())
    x = torch.randn(1, 24)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(layer(x), masked_linear(x, layer.values, layer.pattern, layer.bias, layer.backend))
            layer.parametrizations.bias.original.mul_(-3)


def test_other_types_go_the_long_way():
    layer = make_layer()
    first = check(layer)
    for dtype in (torch.float64, torch.bfloat16):
        layer.to(dtype)
        x = torch.randn(1, 24, dtype=dtype)
        with torch.no_grad():
            expected = masked_linear(x, layer.values, layer.pattern, layer.bias, layer.backend)
            assert layer(x).dtype == dtype and torch.equal(layer(x), expected)
    assert layer._one_token is first
    check(layer.float())


def test_mixed_types_are_not_read_as_float32():
    layer = make_layer()
    check(layer)
    layer.values.data = layer.values.data.to(torch.bfloat16)
    assert one_token.prepare(layer.values, layer.pattern, layer.bias) is None
    layer.bias.data = layer.bias.data.to(torch.bfloat16)
    x = torch.randn(1, 24)
    with torch.no_grad():
        layer(x)
    assert layer._one_token is None


def test_the_same_place_in_another_way():
    layer = make_layer()
    memory = torch.randn(2 * layer.values.numel())
    layer.values.data = memory[: layer.values.numel()]
    check(layer)
    layer.values.data = memory[::2]
    with torch.no_grad():
        x = torch.randn(1, 24)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        layer.values.data = memory[:5]
        with pytest.raises(ValueError, match="are not those of a sparse layer"):
            layer(x)


def test_not_with_gradients_several_tokens_autocast_or_another_backend():
    for run in (
        lambda layer, x: layer(x).sum().backward(),
        lambda layer, x: torch.no_grad()(layer)(x.expand(3, -1)),
        lambda layer, x: torch.no_grad()(torch.autocast("cpu", torch.bfloat16)(layer))(x),
        lambda layer, x: torch.no_grad()(torch.vmap(layer))(x),
    ):
        layer = make_layer()
        run(layer, torch.randn(1, 24))
        assert layer._one_token is None
    layer = make_layer()
    layer.backend = "reference"
    with torch.no_grad():
        layer(torch.randn(1, 24))
    assert layer._one_token is None


def test_an_input_of_another_width_is_refused():
    layer = make_layer()
    check(layer)
    for x in (torch.randn(1, 23), torch.randn(24, 1), torch.randn(2, 12), torch.tensor(1.0)):
        with torch.no_grad(), pytest.raises(ValueError, match="does not fit"):
            layer(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_read_their_own_weights(copied):
    layer = make_layer()
    check(layer)
    other = copied(layer)
    assert other._one_token is None
    with torch.no_grad():
        layer.values.zero_()
    check(other)


def test_a_token_in_inference_mode_and_a_compiled_layer():
    layer, x = make_layer(), torch.randn(1, 24)
    with torch.inference_mode():
        expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)
