import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_topkast.ops import BACKENDS
from hf_topkast.ops.grouped import Experts, grouped_linear, owners
from hf_topkast.storage import Pattern


EXPERTS, OUT, IN = 5, 8, 12
# Rows of each expert, and rows behind them that are for none.
COUNTS = {
    "many": ([7, 3, 9, 4, 6], 0),
    "some": ([4, 0, 0, 1, 2], 3),
    "one": ([0, 0, 1, 0, 0], 0),
    "none": ([0] * 5, 2),
}
COUNTS["no rows"] = ([0] * 5, 0)
KERNELS = [*BACKENDS, "auto"]


def problem(counts="many", dtype=torch.float64, block_size=(1, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(EXPERTS * OUT // block_size[0], IN // block_size[1], generator=generator)
    draw[OUT : 2 * OUT] += 1  # the second expert stores nothing, where blocks are single weights
    grown = [torch.kron((draw < share).int(), torch.ones(block_size, dtype=torch.int)).bool() for share in (0.3, 0.7)]
    pattern = Pattern.from_masks(*grown, block_size)
    theta = torch.randn(EXPERTS * OUT, IN, generator=generator, dtype=torch.float64).to(dtype)
    rows, rest = COUNTS[counts]
    ends = torch.tensor(rows).cumsum(0).int()
    x = torch.randn(sum(rows) + rest, IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(EXPERTS, OUT, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    values = theta.flatten()[pattern.flat_index()].clone().requires_grad_()
    return theta, grown[0], pattern, values, x, ends, bias


def dense(theta, active, x, ends, bias):
    """Output and gradients of its sum by these weights, by a loop over dense experts."""
    alpha = (theta * active).view(EXPERTS, OUT, IN).detach().requires_grad_()
    own, offset = x.detach().clone().requires_grad_(), None if bias is None else bias.detach().clone().requires_grad_()
    y = []
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        y.append(torch.nn.functional.linear(own[begin:end], alpha[expert], None if bias is None else offset[expert]))
        begin = end
    y.append(torch.zeros(len(x) - begin, OUT, dtype=x.dtype))
    return torch.cat(y), own, alpha, offset


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("block_size", [(1, 1), (4, 2)])
def test_output_and_gradients_are_those_of_a_loop_over_dense_experts(backend, counts, with_bias, block_size):
    dtype = torch.float64 if backend == "reference" else torch.float32
    theta, active, pattern, values, x, ends, bias = problem(counts, dtype, block_size)
    bias = bias if with_bias else None
    y = grouped_linear(x, ends, values, pattern, bias, backend)
    expected, own, alpha, offset = dense(theta, active, x, ends, bias)
    torch.testing.assert_close(y, expected.detach())
    weights = torch.randn(*y.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    zeros = torch.zeros(EXPERTS * OUT * IN, dtype=dtype)
    gradient = zeros if alpha.grad is None else alpha.grad.flatten()
    torch.testing.assert_close(values.grad, gradient[pattern.flat_index()])
    torch.testing.assert_close(x.grad, torch.zeros_like(x) if own.grad is None else own.grad)
    if with_bias:
        torch.testing.assert_close(bias.grad, offset.grad)
    with torch.no_grad():  # past the dispatcher
        torch.testing.assert_close(grouped_linear(x, ends, values, pattern, bias, backend), y.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("backend", KERNELS)
def test_half_precision(backend):
    theta, active, pattern, values, x, ends, bias = problem("some", torch.bfloat16)
    y = grouped_linear(x, ends, values, pattern, bias, backend)
    assert y.dtype == torch.bfloat16
    expected = dense(theta.float(), active, x.float(), ends, bias.float())[0]
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)


def test_autocast():
    _, _, pattern, values, x, ends, bias = problem("some", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, ends, values, pattern, bias, "auto")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert values.grad.dtype == x.grad.dtype == bias.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), grouped_linear(x, ends, values, pattern, bias, "auto"), rtol=3e-2, atol=3e-2)


def test_gradcheck_where_the_layer_is_differentiable():
    theta, active, _, _, x, ends, bias = problem("some")
    pattern = Pattern.from_masks(active, active)  # with B = A the straight-through gradient is the true one
    values = theta.flatten()[pattern.flat_index()].clone().requires_grad_()

    def product(x, values, bias):
        return grouped_linear(x, ends, values, pattern, bias, "reference")

    assert torch.autograd.gradcheck(product, (x, values, bias))
    assert torch.autograd.gradgradcheck(product, (x, values, bias))


def test_transforms_see_the_product():
    theta, active, _, _, x, ends, bias = problem("some")
    pattern = Pattern.from_masks(active, active)
    values = theta.flatten()[pattern.flat_index()].clone()
    x, bias = x.detach(), bias.detach()

    def product(x, values):
        return grouped_linear(x, ends, values, pattern, bias, "reference")

    y, expected = product(x, values), product(x + 1e-6, values)
    tangent = torch.func.jvp(product, (x, values), (torch.ones_like(x), torch.zeros_like(values)))[1]
    torch.testing.assert_close(tangent, (expected - y) / 1e-6, rtol=1e-4, atol=1e-6)
    own = values.requires_grad_()
    product(x, own).square().sum().backward()
    found = torch.func.grad(lambda values: product(x, values).square().sum())(values.detach())
    torch.testing.assert_close(found, own.grad)


def test_torch_accepts_the_operator():
    _, _, pattern, values, x, ends, bias = problem("some", torch.float32)
    structure = pattern.row_offsets, pattern.columns
    arguments = x, ends, values, *structure, bias, pattern.shape[0], [1, 1], "reference"
    torch.library.opcheck(torch.ops.hf_topkast.grouped_linear.default, arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = torch.ops.hf_topkast.grouped_linear(mode.from_tensor(x), *arguments[1:])
    assert y.shape == (len(x), OUT)


def test_the_gradient_of_an_expert_without_rows_is_zero():
    _, _, pattern, values, x, ends, _ = problem("some")
    grouped_linear(x, ends, values, pattern, None, "reference").sum().backward()
    row = pattern.flat_index() // (OUT * IN)
    busy = {expert for expert, _ in Experts(pattern, ends).with_rows()}
    assert busy == {0, 3, 4}
    for expert in range(EXPERTS):
        assert bool(values.grad[row == expert].any()) == (expert in busy)


def test_owners():
    assert owners(torch.tensor([2, 2, 5], dtype=torch.int32), 7).tolist() == [0, 0, 2, 2, 2, 3, 3]


def test_misfits_are_refused():
    _, _, pattern, values, x, ends, bias = problem()
    with pytest.raises(ValueError, match=r"shape \(2, 29, 6\).*5 sparse experts of 12 inputs"):
        grouped_linear(x.expand(2, *x.shape)[..., :6], ends, values, pattern, None, "reference")
    with pytest.raises(
        ValueError, match=rf"a bias of shape \(5, 12\).*5 sparse experts of 8 outputs and {len(values)}"
    ):
        grouped_linear(x, ends, values, pattern, x[:5], "reference")
    with pytest.raises(ValueError, match=r"5 values and a bias of shape \(5, 8\) are not those"):
        grouped_linear(x, ends, values[:5], pattern, bias, "reference")
    with pytest.raises(ValueError, match="The input is on cpu and the experts' ends on meta"):
        grouped_linear(x, ends.to("meta"), values, pattern, bias, "reference")


def test_a_part_of_a_pattern_is_the_pattern_of_a_part():
    theta, active, pattern, values, _, ends, _ = problem(block_size=(4, 2))
    experts = Experts(pattern, ends)
    backward = pattern.backward_mask()
    for expert in range(EXPERTS):
        rows = slice(expert * OUT, (expert + 1) * OUT)
        part, slots, exploring = experts.stored(expert)
        expected = Pattern.from_masks(active[rows], backward[rows], (4, 2))
        assert all(torch.equal(one, two) for one, two in zip(part[:2], expected[:2]))
        assert part.shape == (OUT, IN) and part.columns.dtype == pattern.columns.dtype
        own = torch.cat([values[slots], values[exploring]])
        assert torch.equal(own, theta[rows].flatten()[expected.flat_index()])
        alone, slots = experts.active(expert)
        assert torch.equal(alone.backward_mask(), active[rows]) and torch.equal(alone.active_mask(), active[rows])
        assert alone.columns.untyped_storage().data_ptr() == pattern.columns.untyped_storage().data_ptr()
