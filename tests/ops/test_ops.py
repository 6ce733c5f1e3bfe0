import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from hf_topkast import ops
from hf_topkast.ops import masked_linear, select_backend
from hf_topkast.storage import Pattern


OUT, IN = 6, 5


def problem(dtype=torch.float64, leading=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(OUT, IN, generator=generator)
    active, backward = draw < 0.3, draw < 0.7
    theta = torch.randn(OUT, IN, generator=generator, dtype=torch.float64).to(dtype)
    pattern = Pattern.from_masks(active, backward)
    values = theta.flatten()[pattern.flat_index()].clone().requires_grad_()
    x = torch.randn(*leading, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(OUT, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return theta, active, pattern, values, x, bias


def dense_gradients(theta, active, pattern, x, bias, weights):
    """dX, dW|B and db of sum(weights * (x·αᵀ + b)), by the dense formula."""
    alpha = theta * active
    rows, outer = x.detach().reshape(-1, IN), weights.reshape(-1, OUT)
    return (outer @ alpha).view_as(x), (outer.T @ rows).flatten()[pattern.flat_index()], outer.sum(0)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients_equal_the_dense_masked_layer(leading, with_bias):
    theta, active, pattern, values, x, bias = problem(leading=leading)
    y = masked_linear(x, values, pattern, bias if with_bias else None, "reference")
    expected = x.detach() @ (theta * active).T + (bias.detach() if with_bias else 0)
    torch.testing.assert_close(y, expected)
    weights = torch.randn(*leading, OUT, dtype=torch.float64)
    (y * weights).sum().backward()
    dx, dvalues, dbias = dense_gradients(theta, active, pattern, x, bias, weights)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(values.grad, dvalues)
    if with_bias:
        torch.testing.assert_close(bias.grad, dbias)


def test_gradcheck_where_the_layer_is_differentiable():
    # With B = A the straight-through gradient is the true one.
    theta, active, _, _, x, bias = problem()
    pattern = Pattern.from_masks(active, active)
    values = theta.flatten()[pattern.flat_index()].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *inputs: masked_linear(inputs[0], inputs[1], pattern, inputs[2], "reference"), (x, values, bias)
    )


def test_double_use_adds_gradients():
    theta, active, pattern, values, x, _ = problem()
    square = torch.randn(OUT, OUT, dtype=torch.float64)
    first = masked_linear(x, values, pattern, None, "reference")
    second = masked_linear((first @ square)[..., :IN], values, pattern, None, "reference")
    (first.sum() + second.sum()).backward()

    dense = theta.clone().requires_grad_()
    straight = (theta * active) + (dense - dense.detach())
    dense_first = x.detach() @ straight.T
    dense_second = (dense_first @ square)[..., :IN] @ straight.T
    (dense_first.sum() + dense_second.sum()).backward()
    torch.testing.assert_close(values.grad, dense.grad.flatten()[pattern.flat_index()])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    def gradients(run):
        _, _, pattern, values, x, bias = problem()
        run(lambda x: masked_linear(x, values, pattern, bias, "reference"), x).square().sum().backward()
        return x.grad, values.grad, bias.grad

    plain = gradients(lambda layer, x: layer(x))
    for got, want in zip(gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)), plain):
        assert torch.equal(got, want)


def test_bfloat16_equals_the_dense_masked_layer():
    theta, active, pattern, values, x, bias = problem(torch.bfloat16, leading=(9,))
    y = masked_linear(x, values, pattern, bias, "reference")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.nn.functional.linear(x.detach(), theta * active, bias.detach()))
    y.sum().backward()
    assert values.grad.dtype == torch.bfloat16
    torch.testing.assert_close(values.grad, (torch.ones_like(y).T @ x.detach()).flatten()[pattern.flat_index()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_that_of_a_dense_layer(dtype):
    theta, active, pattern, values, x, bias = problem(torch.float32)
    dense = (theta * active).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = masked_linear(x, values, pattern, bias, "reference")
        expected = torch.nn.functional.linear(x.detach(), dense, bias.detach())
    assert y.dtype == expected.dtype == dtype
    assert torch.equal(y, expected)
    y.float().sum().backward()
    expected.float().sum().backward()
    assert values.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, dense.grad.flatten()[pattern.flat_index()])


def test_nothing_of_the_size_of_the_weight_is_kept_for_backward():
    shape = (40, 30)
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    pattern = Pattern.from_masks(draw < 0.1, draw < 0.2)
    values = torch.randn(pattern.columns.numel(), requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        masked_linear(torch.randn(2, 30), values, pattern, None, "reference").sum()
    assert kept and max(kept) == values.numel() < 40 * 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_gradients_the_output_is_the_same(dtype):
    _, _, pattern, values, x, bias = problem(dtype)
    expected = masked_linear(x, values, pattern, bias, "auto")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = masked_linear(x, values, pattern, bias, "auto")
        assert torch.equal(y, expected) and not y.requires_grad


def test_weights_without_numbers_are_not_read():
    _, _, pattern, values, _, _ = problem(torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(values.detach())
    for tokens in (1, 3):
        with torch.no_grad():
            y = masked_linear(torch.randn(tokens, IN), fake, pattern, None, "auto")
        assert isinstance(y, FakeTensor) and y.shape == (tokens, OUT)


def test_frozen_inputs_get_no_gradient():
    _, _, pattern, values, x, bias = problem()
    masked_linear(x.detach(), values.detach(), pattern, bias, "reference").sum().backward()
    assert values.grad is None and x.grad is None
    assert bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ordinary_training_and_inference_run_the_operators(monkeypatch, backend, dtype):
    def refuse(*operands):
        raise AssertionError("composed of dense operations")

    for product in ("forward", "grad_input", "grad_values"):
        monkeypatch.setattr(ops.composite, product, refuse)
    _, _, pattern, values, x, bias = problem(dtype)

    def layer(x):
        return masked_linear(x, values, pattern, bias, backend)

    layer(x).sum().backward()
    for reentrant in (True, False):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    with torch.no_grad():
        layer(x)
    with forward_ad.dual_level(), pytest.raises(AssertionError, match="composed"):
        layer(x)
    with pytest.raises(AssertionError, match="composed"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_registration_is_sound():
    _, _, pattern, values, x, bias = problem(torch.float32)
    for given_bias, walk in ((bias, pattern.walk_by_columns()), (None, None)):
        case = (x, values, pattern.row_offsets, pattern.columns, walk, given_bias, [1, 1], "reference")
        result = torch.library.opcheck(torch.ops.hf_topkast.linear.default, case)
        assert set(result.values()) == {"SUCCESS"}


def test_without_the_kernels_the_reference_is_used_and_said_so_once(monkeypatch):
    monkeypatch.delitem(ops.BACKENDS, "cpu", raising=False)
    monkeypatch.setattr(ops, "WHY_NO_CPU", "no module '_native'", raising=False)
    messages = []
    monkeypatch.setattr(ops.logger, "warning_once", messages.append)
    for dtype, warnings in ((torch.float64, 0), (torch.float32, 1)):
        assert ops.implementation("auto", "forward", torch.zeros(2, dtype=dtype), None) is ops.reference
        assert len(messages) == warnings
    assert "no module '_native'" in messages[0] and "compiler" in messages[0]
    with pytest.raises(ValueError, match="backend='cpu'.*reference"):
        select_backend("cpu")


def test_backend_names():
    assert select_backend("auto") == "auto"
    assert select_backend("reference") == "reference"
    with pytest.raises(ValueError, match="backend='tpu'.*triton.*reference"):
        select_backend("tpu")


def test_triton_is_imported_only_where_it_is_asked_for():
    script = """
import sys, torch, hf_topkast
sys.modules["triton"] = None  # as if it were not installed: an import of it fails
layer = hf_topkast.sparsify(torch.nn.Sequential(torch.nn.Linear(4, 4)), density=0.5, target_modules=["0"])
layer(torch.ones(2, 4)).sum().backward()
assert "hf_topkast.ops.triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_triton_by_name(monkeypatch):
    monkeypatch.setattr(ops, "has_triton", lambda: True)
    assert select_backend("triton") == "triton"
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"not installed.*hf-topkast\[gpu\]"):
        select_backend("triton")
