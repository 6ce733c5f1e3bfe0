"""The products of experts in the C++ extension against the dense formulas in float64, on one thread and on two."""

import pytest
import torch

from hf_topkast.ops import costs
from hf_topkast.ops.crossovers import DTYPES, PRODUCTS, TOKENS
from hf_topkast.ops.grouped import forward as product
from hf_topkast.ops.grouped import grad_input, grad_values, grouped_linear
from hf_topkast.storage import Pattern


grouped_cpu = pytest.importorskip(
    "hf_topkast.ops.grouped_cpu", reason="the C++ extension is not built", exc_type=ImportError
)

EXPERTS, OUT, IN = 6, 40, 48
# Rows of each expert: for every way of the kernels, and one that takes most of the work; some are for no expert.
COUNTS = {
    "one token": ([0, 1, 0, 0, 1, 0], 0),
    "few": ([2, 3, 0, 17, 64, 5], 2),
    "many": ([70, 200, 0, 333, 130, 1], 3),
    "one busy": ([0, 0, 500, 0, 0, 0], 0),
    "none": ([0] * 6, 4),
}


def problem(counts, dtype, block_size):
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(EXPERTS * OUT // block_size[0], IN // block_size[1], generator=generator)
    masks = [torch.kron((draw < share).int(), torch.ones(block_size, dtype=torch.int)).bool() for share in (0.2, 0.5)]
    pattern = Pattern.from_masks(*masks, block_size)
    rows, rest = COUNTS[counts]
    ends = torch.tensor(rows).cumsum(0).int()

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    count = sum(rows) + rest
    theta, bias, x, dy = normal(EXPERTS * OUT, IN), normal(EXPERTS, OUT), normal(count, IN), normal(count, OUT)
    return theta * masks[0], pattern, theta.flatten()[pattern.flat_index()], x, dy, ends, bias


def exact(alpha, pattern, x, dy, ends, bias):
    alpha, x, dy, bias = (tensor.double() for tensor in (alpha.view(EXPERTS, OUT, IN), x, dy, bias))
    y, dx, dense = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(alpha)
    for expert, (first, last) in enumerate(zip([0, *ends.tolist()], ends.tolist())):
        y[first:last] = x[first:last] @ alpha[expert].T + bias[expert]
        dx[first:last] = dy[first:last] @ alpha[expert]
        dense[expert] = dy[first:last].T @ x[first:last]
    return y, dx, dense.flatten()[pattern.flat_index()]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("backend", ["cpu", "expanded", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [(1, 1), (4, 2), (8, 16)])
def test_products_equal_the_dense_ones(count, counts, backend, dtype, block_size, threads):
    threads(count)
    alpha, pattern, values, x, dy, ends, bias = problem(counts, dtype, block_size)
    assert grouped_cpu.is_for(backend, x, values)

    def run():
        return (
            product(x, ends, values, pattern, bias, backend),
            grad_input(dy, ends, values, pattern, backend),
            grad_values(dy, x, ends, pattern, backend),
        )

    tolerance = {"rtol": 1e-5, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-1}
    for got, want, again in zip(run(), exact(alpha, pattern, x, dy, ends, bias), run()):
        assert got.dtype == dtype and torch.equal(got, again)
        torch.testing.assert_close(got.double(), want, **tolerance)


def test_what_the_extension_does_not_know_goes_another_way():
    x = torch.zeros(2, 3)
    assert not grouped_cpu.is_for("auto", x.double()) and not grouped_cpu.is_for("reference", x)
    assert not grouped_cpu.is_for("auto", x, x.to("meta"))


@pytest.mark.parametrize("ends", [[3, 2, 4, 4, 4, 4], [1, 2, 3, 4, 5, 600], [-1, 0, 0, 0, 0, 0]])
def test_ends_that_are_not_those_of_the_rows_are_refused(ends):
    _, pattern, values, x, *_ = problem("one busy", torch.float32, (1, 1))
    with pytest.raises(ValueError, match="must ascend"):
        grouped_linear(x, torch.tensor(ends, dtype=torch.int32), values, pattern, None, "cpu")


@pytest.mark.parametrize("block_size", [(1, 1), (4, 2), (8, 16)])
def test_the_extension_chooses_as_for_a_layer(block_size):
    for dtype, name in ((dtype, name) for dtype in DTYPES for name in PRODUCTS):
        dtype = getattr(torch, dtype)
        limits = grouped_cpu._limits(name, dtype, block_size, "auto")
        for tokens in (1, 2, 3, 4, 31, 32, *TOKENS, 100, 9999):
            for share in (0, 0.1, 0.3, 0.6, 1):
                active = torch.zeros(80, 80, dtype=torch.bool)
                active[: round(share * 80)] = True
                pattern = Pattern.from_masks(active, active, block_size)
                chosen = costs.sparse_is_faster(name, torch.empty(tokens, 80, dtype=dtype), pattern)
                assert limits.sparse(tokens, int(active.sum()), active.numel()) == chosen
