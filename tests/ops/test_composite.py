"""Derivatives of every kind, of both sparse layers, against a dense function of the same values."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as functional_hessian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_topkast.layers.linear import TopKastConv1D, TopKastLinear
from hf_topkast.storage import spread_blocks


OUT, IN = 4, 6
DENSE = {"linear": lambda: nn.Linear(IN, OUT), "conv1d": lambda: Conv1D(OUT, IN)}


def make_layer(kind="linear", block_size=(1, 1), seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    dense = DENSE[kind]().to(dtype)
    nn.init.normal_(dense.weight)
    nn.init.normal_(dense.bias)
    blocks = OUT // block_size[0], IN // block_size[1]
    order = torch.randperm(blocks[0] * blocks[1]).view(blocks)
    active, backward = (spread_blocks(order < share * order.numel(), block_size) for share in (0.34, 0.67))
    assert 0 < active.sum() < backward.sum() < OUT * IN
    sparse = TopKastConv1D if kind == "conv1d" else TopKastLinear
    return sparse(dense, active, backward, block_size=block_size)


class Multiplied(nn.Module):
    """A model that multiplies by the weight of a layer itself."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        return x @ (weight if isinstance(self.layer, Conv1D) else weight.T) + self.layer.bias


def dense_function(layer):
    """
    x·αᵀ + b as a function of (values, bias, x), of products with constants: at the layer's values α is that of A, and
    its derivative is that of all of B.
    """
    height, width = layer.block_size
    active = layer.active_mask.T if isinstance(layer, Conv1D) else layer.active_mask
    backward = layer.backward_mask.T if isinstance(layer, Conv1D) else layer.backward_mask
    places = [  # block by block, each row by row, first those of A
        (row * height + i) * IN + column * width + j
        for mask in (active, backward & ~active)
        for row, column in mask[::height, ::width].nonzero().tolist()
        for i in range(height)
        for j in range(width)
    ]
    values = layer.values.detach().clone()
    spread = torch.zeros(OUT * IN, len(places), dtype=values.dtype)
    spread[places, range(len(places))] = 1
    unused = spread @ torch.where(torch.arange(len(places)) < int(active.sum()), 0, values)

    def apply(values: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return x @ (spread @ values - unused).view(OUT, IN).T + bias

    return apply


def sparse_function(layer, way):
    model, prefix = (layer, "") if way == "forward" else (Multiplied(layer), "layer.")
    return lambda values, bias, x: functional_call(model, {prefix + "values": values, prefix + "bias": bias}, (x,))


def operands(layer, leading, dtype=torch.float64):
    x = torch.randn(*leading, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return layer.values.detach().clone(), layer.bias.detach().clone(), x


def directions(tensors):
    """Tangents that vmap and compile can make, where they would refuse random ones."""
    return tuple(torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in tensors)


def loss_of(function):
    return lambda *operands: function(*operands).tanh().square().sum()


ALL = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f, at: grad(loss_of(f), ALL)(*at),
    "vmap": lambda f, at: vmap(f, (None, None, 0))(*at),
    "vmap over values": lambda f, at: vmap(f, (0, None, None))(at[0].expand(3, -1), *at[1:]),
    "per-sample gradients": lambda f, at: vmap(grad(loss_of(f), ALL), (None, None, 0))(*at),
    "jvp": lambda f, at: jvp(f, at, directions(at)),
    "jvp of the input": lambda f, at: jvp(lambda x: f(*at[:2], x), at[2:], directions(at)[2:]),
    "vmap(jvp)": lambda f, at: vmap(lambda x: jvp(lambda v: f(v, at[1], x), at[:1], directions(at)[:1]))(at[2]),
    "vjp": lambda f, at: (lambda y, pull: (y, pull(y.cos())))(*vjp(f, *at)),
    "jacfwd": lambda f, at: jacfwd(f, ALL)(*at),
    "jacrev": lambda f, at: jacrev(f, ALL)(*at),
    "hessian": lambda f, at: hessian(loss_of(f), ALL)(*at),
    "jacrev(jacrev)": lambda f, at: jacrev(jacrev(loss_of(f), ALL), ALL)(*at),
    "jacfwd(jacfwd)": lambda f, at: jacfwd(jacfwd(loss_of(f), ALL), ALL)(*at),
    "grad of a jvp": lambda f, at: grad(lambda *at: jvp(loss_of(f), at, directions(at))[1], ALL)(*at),
    "per-sample hessian": lambda f, at: vmap(hessian(loss_of(f)), (None, None, 0))(*at),
}


def assert_same(got, expected, **tolerance):
    torch.testing.assert_close(got, expected, **tolerance)
    assert all(t.count_nonzero() for t in torch.utils._pytree.tree_leaves(got[:1]))


@pytest.mark.parametrize("leading", [(3,), (3, 2)])
@pytest.mark.parametrize("way", ["forward", "weight"])
@pytest.mark.parametrize("block_size", [(1, 1), (2, 3)])
@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_equal_those_of_the_dense_function(transform, kind, block_size, way, leading):
    layer = make_layer(kind, block_size)
    at = operands(layer, leading)
    assert_same(transform(sparse_function(layer, way), at), transform(dense_function(layer), at))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), ALL])
@pytest.mark.parametrize("leading", [(), (1,), (3,)])
@pytest.mark.parametrize("way", ["forward", "weight"])
@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dual_numbers(dtype, kind, way, leading, chosen, gradients):
    layer = make_layer(kind, dtype=dtype)
    at = operands(layer, leading, dtype)
    ahead = [direction if i in chosen else None for i, direction in enumerate(directions(at))]

    def run(function):
        with torch.set_grad_enabled(gradients), forward_ad.dual_level():
            duals = [t if d is None else forward_ad.make_dual(t, d) for t, d in zip(at, ahead)]
            return tuple(forward_ad.unpack_dual(function(*duals)))

    got = run(sparse_function(layer, way))
    assert got[1] is not None and got[1].count_nonzero()
    torch.testing.assert_close(got, run(dense_function(layer)))


@pytest.mark.parametrize("gradients", [True, False])
def test_one_token_whose_product_is_prepared(gradients):
    layer = make_layer(dtype=torch.float32)
    values, bias, x = operands(layer, (1,), torch.float32)
    with torch.no_grad():
        layer(x)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, dense_function(layer)(values, torch.zeros_like(bias), x))
    with torch.set_grad_enabled(gradients):
        batched = vmap(layer)(x)
    torch.testing.assert_close(batched.detach(), dense_function(layer)(values, bias, x))


def test_linearize():
    layer = make_layer()
    at = operands(layer, (3,))

    def run(function):
        y, push_forward = linearize(function, *at)
        return y, push_forward(*directions(at))

    assert_same(run(sparse_function(layer, "forward")), run(dense_function(layer)))


def leaves(layer, leading=(3,)):
    return [t.requires_grad_() for t in operands(layer, leading)]


@pytest.mark.parametrize("way", ["forward", "weight"])
@pytest.mark.parametrize("block_size", [(1, 1), (2, 3)])
@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("wanted", [(0,), (2,), ALL])
def test_a_penalty_on_gradients(kind, block_size, way, wanted):
    layer = make_layer(kind, block_size)

    def run(function):
        at = leaves(layer)
        gradients = torch.autograd.grad(loss_of(function)(*at), [at[i] for i in wanted], create_graph=True)
        sum(gradient.sin().sum() for gradient in gradients).backward()
        return [t.grad for t in at]

    assert_same(run(sparse_function(layer, way)), run(dense_function(layer)))


def test_third_derivatives():
    layer = make_layer()

    def run(function):
        at = leaves(layer)
        total = loss_of(function)(*at)
        for _ in range(3):
            derivatives = torch.autograd.grad(total, at, create_graph=True)
            total = sum(derivative.sin().sum() for derivative in derivatives)
        return derivatives

    assert_same(run(sparse_function(layer, "forward")), run(dense_function(layer)))


def test_gradgradcheck_where_the_layer_is_differentiable():
    torch.manual_seed(0)
    everywhere = torch.rand(OUT, IN) < 0.5  # with B = A the straight-through derivatives are the true ones
    layer = TopKastLinear(nn.Linear(IN, OUT).double(), everywhere, everywhere)
    function, at = sparse_function(layer, "forward"), leaves(layer)
    assert torch.autograd.gradcheck(function, at, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, at, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    "settings",
    [{}, {"vectorize": True}, {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}],
    ids=["loop", "vectorized", "forward over reverse"],
)
def test_hessian_of_torch_autograd(settings):
    layer = make_layer()
    at = operands(layer, (2,))
    got, expected = (
        functional_hessian(loss_of(function), at, **settings)
        for function in (sparse_function(layer, "forward"), dense_function(layer))
    )
    torch.testing.assert_close(got, expected)


def test_a_tangent_or_a_batch_that_comes_in_the_backward_pass():
    layer = make_layer()

    def run(function):
        at = leaves(layer)
        y = function(*at)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(y.detach().sin(), y.detach().cos())
            pairs = [forward_ad.unpack_dual(g) for g in torch.autograd.grad(y, at, dual, retain_graph=True)]
        batch = torch.stack([y.detach().sin(), y.detach().cos()])
        return [tuple(pair) for pair in pairs], torch.autograd.grad(y, at, batch, is_grads_batched=True)

    torch.testing.assert_close(run(sparse_function(layer, "forward")), run(dense_function(layer)))


def test_second_derivatives_through_gradient_checkpointing():
    layer = make_layer()

    def run(function):
        at = leaves(layer)
        loss = checkpoint(loss_of(function), *at, use_reentrant=False)
        sum(gradient.sin().sum() for gradient in torch.autograd.grad(loss, at, create_graph=True)).backward()
        return [t.grad for t in at]

    assert_same(run(sparse_function(layer, "forward")), run(dense_function(layer)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layer = make_layer(dtype=torch.float32)
    at = operands(layer, (3,), torch.float32)

    def run(function):
        with torch.autocast("cpu", dtype):
            return function(*at), *grad(loss_of(function), ALL)(*at), jvp(function, at, directions(at))[1]

    got, expected = (run(function) for function in (sparse_function(layer, "forward"), dense_function(layer)))
    assert [t.dtype for t in got] == [dtype, *[torch.float32] * 3, dtype]
    for one, other in zip(got, expected):
        torch.testing.assert_close(one.float(), other.float(), rtol=0.05, atol=0.05)


def test_layers_of_different_sets_as_one_batch():
    layers = [make_layer(seed=seed) for seed in range(3)]
    parameters, buffers = stack_module_state(layers)
    parameters = {name: parameter.detach() for name, parameter in parameters.items()}
    base, x = copy.deepcopy(layers[0]), operands(layers[0], (3,))[2]

    def loss(parameters, buffers):
        return functional_call(base, (parameters, buffers), (x,)).tanh().square().sum()

    gradients = vmap(grad(loss))(parameters, buffers)
    for i, layer in enumerate(layers):
        at = operands(layer, (3,))
        expected = grad(loss_of(dense_function(layer)), (0, 1))(*at[:2], x)
        torch.testing.assert_close((gradients["values"][i], gradients["bias"][i]), expected)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["grad", "per-sample gradients", "jvp", "hessian"])
def test_compiled_transforms(fresh_dynamo, name):
    layer = make_layer()
    at = operands(layer, (3,))

    def run(*at):
        return TRANSFORMS[name](sparse_function(layer, "forward"), at)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*at), TRANSFORMS[name](dense_function(layer), at))


def test_a_compiled_layer_sees_dual_numbers(fresh_dynamo):
    layer = make_layer()
    compiled, x = torch.compile(layer, backend="aot_eager"), operands(layer, (3,))[2]
    with torch.no_grad():
        compiled(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            got, expected = (forward_ad.unpack_dual(function(dual)).tangent for function in (compiled, layer))
    torch.testing.assert_close(got, expected)


TRACES = {
    "make_fx": lambda layer, x: make_fx(layer)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)).module(),
    "jit.trace": lambda layer, x: torch.jit.trace(layer, x),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
def test_a_graph_that_would_lose_tangents_says_so(trace, gradients):
    layer = make_layer()
    x = operands(layer, (3,))[2]
    with torch.set_grad_enabled(gradients):
        graph = trace(layer, x)
        for transform in (lambda: jvp(graph, (x,), (x,)), lambda: jacfwd(graph)(x)):
            with pytest.raises(RuntimeError, match=r"tangents of zero.*the model itself.*densify"):
                transform()
        torch.testing.assert_close(graph(x), layer(x))
    with pytest.raises(RuntimeError):
        grad(lambda x: graph(x).sum())(x)


def test_second_derivatives_of_a_compiled_layer_are_refused(fresh_dynamo):
    layer = make_layer()
    _, _, x = leaves(layer)
    y = torch.compile(layer, backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("way", ["forward", "weight"])
def test_weights_outside_a_change_nothing_and_have_derivatives(way):
    layer = make_layer()
    values, bias, x = operands(layer, (3,))
    function, outside = sparse_function(layer, way), slice(layer.pattern.active, None)
    changed = values.clone()
    changed[outside] += 1
    y, tangent = jvp(lambda v: function(v, bias, x), (changed,), (torch.ones_like(values),))
    torch.testing.assert_close(y, vmap(lambda x: function(values, bias, x))(x))
    assert grad(lambda v: function(v, bias, x).square().sum())(changed)[outside].all()
    for differentiate in (jacfwd, jacrev):
        jacobian = differentiate(lambda v: function(v, bias, x))(changed)
        torch.testing.assert_close(jacobian.sum(-1), tangent)
