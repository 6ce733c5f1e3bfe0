"""The C++ kernels against the dense masked product, for every instruction set of this machine."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf_topkast.ops import BACKENDS, implementation, masked_linear, reference
from hf_topkast.storage import Pattern


cpu = pytest.importorskip("hf_topkast.ops.cpu", reason="the C++ extension is not built", exc_type=ImportError)

ROW_GROUP = 1024  # of native/ways.cpp
SIZES = [(1, 1), (3, 172), (172, 3), (769, 64), (130, 769)]
SHARES = {"sparse": (0.1, 0.2), "no exploration": (0.3, 0.3), "full": (1.0, 1.0), "empty": (0.0, 0.0)}


@pytest.fixture(params=list(cpu.INSTRUCTION_SETS), autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setattr(cpu, "isa", request.param)
    return request.param


def problem(shape, tokens, shares=(0.1, 0.2), dtype=torch.float32, seed=0, block_size=(1, 1)):
    """α, pattern, values, bias, x and dY; row 0 (of blocks) is empty, row 1 full, where there are more."""
    generator = torch.Generator().manual_seed(seed)
    height, width = block_size
    draw = torch.rand(shape[0] // height, shape[1] // width, generator=generator)
    active, backward = draw < shares[0], draw < shares[1]
    if len(draw) > 2 and 0 < shares[0] < 1:
        active[0] = backward[0] = False
        active[1] = backward[1] = True
    active, backward = (mask.repeat_interleave(height, 0).repeat_interleave(width, 1) for mask in (active, backward))

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    theta, bias = normal(*shape), normal(shape[0])
    pattern = Pattern.from_masks(active, backward, block_size)
    values = theta.flatten()[pattern.flat_index()]
    return theta * active, pattern, values, bias, normal(tokens, shape[1]), normal(tokens, shape[0])


def exact(alpha, pattern, bias, x, dy):
    """The three products by the dense formulas, in float64."""
    alpha, bias, x, dy = (tensor.double() for tensor in (alpha, bias, x, dy))
    return x @ alpha.T + bias, dy @ alpha, (dy.T @ x).flatten()[pattern.flat_index()]


def products(pattern, values, bias, x, dy):
    return (
        cpu.forward(x, values, pattern, bias),
        cpu.grad_input(dy, values, pattern),
        cpu.grad_values(dy, x, pattern),
    )


def assert_products(case, dtype=torch.float32):
    alpha, pattern, values, bias, x, dy = case
    atol = 1e-5 * max(*alpha.shape, len(x)) ** 0.5
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2**-8, "atol": atol}
    for got, want in zip(products(pattern, values, bias, x, dy), exact(alpha, pattern, bias, x, dy)):
        assert got.dtype == dtype and got.shape == want.shape
        torch.testing.assert_close(got.double(), want, **tolerance)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 50, 64, 333])
def test_products_equal_the_dense_masked_ones(shape, shares, tokens):
    assert_products(problem(shape, tokens, shares))


@pytest.mark.parametrize("block_size", [(4, 1), (1, 4), (4, 4), (3, 5), (8, 2), (16, 16), (2, 48), (32, 96)])
@pytest.mark.parametrize("tokens", [0, 1, 3, 20, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_any_size(block_size, tokens, dtype):
    shape = block_size[0] * (192 // block_size[0]), block_size[1] * (96 // block_size[1])
    assert_products(problem(shape, tokens, (0.3, 0.6), dtype, block_size=block_size), dtype)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 100, 200])
def test_bfloat16_is_the_exact_product_rounded_once(shape, tokens):
    assert_products(problem(shape, tokens, dtype=torch.bfloat16), torch.bfloat16)


def test_each_operand_may_have_its_own_dtype():
    _, pattern, values, bias, x, dy = problem((48, 80), 20)
    mixed = products(pattern, values.bfloat16(), bias.bfloat16(), x, dy)
    same = products(pattern, values.bfloat16().float(), bias.bfloat16().float(), x, dy)
    assert all(torch.equal(got, want) for got, want in zip(mixed, same))
    assert all(torch.equal(got.float(), want.float()) for got, want in zip(mixed, same))


@pytest.mark.parametrize("tokens", [1, 70])
def test_wide_layers_have_int32_columns(tokens):
    case = problem((5, 40_000), tokens, (0.01, 0.02))
    assert case[1].columns.dtype == torch.int32
    assert_products(case)


@pytest.mark.parametrize("tokens", [1, 70, 200])
def test_all_index_types_give_the_same_numbers(tokens):
    _, pattern, *operands = problem((30, 50), tokens)
    wide = Pattern(pattern.row_offsets.long(), pattern.columns.int(), pattern.shape)
    for got, want in zip(products(wide, *operands), products(pattern, *operands)):
        # Not bit for bit: the compiler may fuse the last few multiply-adds of one type and not of another.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_many_rows_are_worked_in_groups():
    assert_products(problem((2 * ROW_GROUP + 5, 40), 70))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_any_number_of_threads(count, tokens, threads):
    threads(count)
    case = problem((100, 200), tokens)
    assert_products(case)
    first, second = products(*case[1:]), products(*case[1:])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_concurrent_calls_do_not_disturb_each_other():
    cases = [problem((60 + i, 90), 130, seed=i) for i in range(8)]
    alone = [products(*case[1:]) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda case: products(*case[1:]), cases * 4))
    for got, want in zip(together, alone * 4):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_inputs_need_not_be_contiguous():
    _, pattern, values, bias, x, dy = problem((30, 50), 12)
    strange = [
        pattern,
        values.repeat_interleave(2)[::2],
        bias.repeat_interleave(3)[::3],
        x.T.contiguous().T,
        dy.expand(2, *dy.shape)[1].T.contiguous().T,
    ]
    for got, want in zip(products(*strange), products(pattern, values, bias, x, dy)):
        assert torch.equal(got, want)


def test_a_nan_stays_where_the_sparse_layer_reads_it():
    alpha, pattern, values, bias, x, _ = problem((40, 60), 20)
    x[3, 5] = float("nan")
    y = cpu.forward(x, values, pattern, bias)
    reads = alpha[:, 5] != 0
    assert torch.equal(y[3].isnan(), reads)
    assert not y[:3].isnan().any() and not y[4:].isnan().any()


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0)])
def test_a_layer_and_its_gradients(leading):
    _, pattern, values, bias, *_ = problem((6, 5), 1, (0.4, 0.7))
    x = torch.randn(*leading, 5)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, values, bias)]
        y = masked_linear(leaves[0], leaves[1], pattern, leaves[2], backend)
        y.square().sum().backward()
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_auto_chooses_by_dtype():
    assert BACKENDS["cpu"] is cpu
    pattern = problem((8, 8), 1)[1]
    for dtype, module in ((torch.float32, cpu), (torch.bfloat16, cpu), (torch.float64, reference)):
        assert implementation("auto", "forward", torch.zeros(1, 8, dtype=dtype), pattern) is module


def test_what_it_cannot_multiply_is_an_error():
    _, pattern, values, bias, x, dy = problem((6, 5), 4)
    with pytest.raises(TypeError, match="float64.*backend='auto'"):
        cpu.forward(x.double(), values, pattern, bias)
    with pytest.raises(ValueError, match="not the layer's 5"):
        cpu.forward(dy, values, pattern, bias)


@pytest.mark.parametrize(
    "change",
    [
        {"columns": lambda columns: columns.long()},
        {"columns": lambda columns: columns.repeat_interleave(2)[::2]},
        {"row_offsets": lambda offsets: offsets[:-1]},
        {"row_offsets": lambda offsets: offsets.to(torch.int16)},
    ],
)
def test_a_pattern_that_it_would_misread_is_an_error(change):
    _, pattern, values, bias, x, dy = problem((6, 5), 4, (0.4, 0.7))
    ((name, alter),) = change.items()
    other = pattern._replace(**{name: alter(getattr(pattern, name))})
    for product in (lambda: cpu.forward(x, values, other, bias), lambda: cpu.grad_input(dy, values, other)):
        with pytest.raises(TypeError, match="contiguous integers"):
            product()


def test_torch_and_the_kernels_share_one_thread_pool():
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    cpu.forward(*(problem((6, 5), 4)[i] for i in (4, 2, 1, 3)))
    pools = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line or "libomp" in line}
    assert len(pools) == 1, pools
