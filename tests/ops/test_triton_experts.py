"""The Triton kernels for experts against a loop over dense masked ones: on a GPU if there is one, else interpreted."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poisoned_memory import runs_on_poisoned_memory

from hf_topkast.ops import grouped, reference
from hf_topkast.ops.grouped import grouped_linear
from hf_topkast.storage import Pattern, spread_blocks


triton = pytest.importorskip("triton", reason="Triton is not installed")

from hf_topkast.ops.triton import (  # noqa: E402
    block_sparse,
    expand,
    experts,
    forward,
    grad_input,
    grad_values,
    launch,
    pieces,
    tiles,
)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows of each expert, and rows behind them that are for none.
COUNTS = {
    "many": ([33, 70, 1, 64], 0),
    "some": ([0, 9, 0, 0], 3),
    "last": ([0, 0, 0, 5], 0),
    "one expert": ([17], 2),
    "none": ([0, 0, 0, 0], 70),
    "no rows": ([0, 0, 0, 0], 0),
}
# Sides of blocks, and of one expert.
SINGLE = {(1, 1): (7, 45), (4, 2): (12, 10), (3, 16): (9, 32)}
BLOCKS = {(16, 16): (32, 48), (32, 64): (64, 128), (128, 16): (128, 32), (48, 32): (96, 32)}
FORMS = pytest.mark.parametrize("block_size, shape", [*SINGLE.items(), *BLOCKS.items()], ids=str)


def problem(counts, shape, block_size=(1, 1), dtype=torch.float32, shares=(0.3, 0.6), seed=0):
    """α of each expert, pattern, values, bias, x, dY, ends. Expert 1 stores nothing, 2 only in B\\A."""
    rows, rest = counts
    generator = torch.Generator().manual_seed(seed)
    grid = len(rows), shape[0] // block_size[0], shape[1] // block_size[1]
    draw = torch.rand(grid, generator=generator)
    active, backward = draw < shares[0], draw < shares[1]
    active[1:3] = backward[1:2] = False
    active, backward = (spread_blocks(mask.flatten(0, 1), block_size).to(DEVICE) for mask in (active, backward))

    def normal(*size):
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    theta = normal(len(rows) * shape[0], shape[1])
    pattern = Pattern.from_masks(active, backward, block_size)._replace(column_walk=None)  # as the operators make it
    values = theta.flatten()[pattern.flat_index()]
    ends = torch.tensor(rows).cumsum(0).int().to(DEVICE)
    tokens, alpha = sum(rows) + rest, (theta * active).view(len(rows), *shape)
    bias = normal(len(rows), shape[0])
    return alpha, pattern, values, bias, normal(tokens, shape[1]), normal(tokens, shape[0]), ends


def exact(alpha, pattern, bias, x, dy, ends):
    """The three products by a loop over dense experts, in float64."""
    alpha, x, dy = (tensor.double() for tensor in (alpha, x, dy))
    y, dx, dense = (torch.zeros_like(tensor) for tensor in (dy, x, alpha))
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        own = slice(begin, end)
        y[own] = x[own] @ alpha[expert].T + (0 if bias is None else bias[expert].double())
        dx[own] = dy[own] @ alpha[expert]
        dense[expert] = dy[own].T @ x[own]
        begin = end
    return y, dx, dense.flatten()[pattern.flat_index()]


def products(pattern, values, bias, x, dy, ends):
    return (
        forward(x, values, pattern, bias, ends),
        grad_input(dy, values, pattern, ends),
        grad_values(dy, x, pattern, ends),
    )


def assert_products(case):
    alpha, pattern, _, bias, x, dy, ends = case
    rounding = torch.finfo(x.dtype).eps
    floor = 1e-6 if x.dtype != torch.float64 else rounding
    for got, want in zip(products(*case[1:]), exact(alpha, pattern, bias, x, dy, ends)):
        assert got.dtype == x.dtype and got.shape == want.shape
        atol = 4 * max(rounding, floor) * max(*alpha.shape, len(x)) ** 0.5
        torch.testing.assert_close(got.double(), want, rtol=2 * rounding, atol=atol)


@FORMS
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_equal_those_of_dense_masked_experts(block_size, shape, counts):
    assert_products(problem(counts, shape, block_size))


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(block_size, shape, dtype):
    assert_products(problem(COUNTS["many"], shape, block_size, dtype))


@pytest.mark.parametrize("shares", [(0.3, 0.3), (1.0, 1.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("block_size, shape", [((1, 1), (7, 45)), ((16, 16), (32, 48))], ids=str)
def test_any_sets_and_no_bias(block_size, shape, shares):
    alpha, pattern, values, _, *rest = problem(COUNTS["some"], shape, block_size, shares=shares)
    assert_products((alpha, pattern, values, None, *rest))


@settings(max_examples=12, deadline=None)
@given(
    counts=st.tuples(st.lists(st.integers(0, 70), min_size=1, max_size=9), st.integers(0, 70)),
    sides=st.tuples(st.sampled_from([1, 2, 16]), st.sampled_from([1, 3, 16])),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 10**6),
)
def test_random_experts(counts, sides, grid, seed):
    shape = tuple(side * count for side, count in zip(sides, grid))
    assert_products(problem(counts, shape, sides, seed=seed))


@pytest.mark.parametrize("tile", experts.PRODUCT_TILES, ids=str)
def test_every_tile_of_the_products(tile, monkeypatch):
    configs = experts.configurations([tile], "TILE_ROWS", "TILE_N", "TILE_K")
    monkeypatch.setattr(experts._product_kernel, "configs", configs)
    assert_products(problem(COUNTS["many"], (70, 45)))


@pytest.mark.parametrize("tile", experts.GRADIENT_TILES, ids=str)
def test_every_tile_of_the_gradients(tile, monkeypatch):
    configs = experts.configurations([tile], "TILE_M", "TILE_N", "TILE_ROWS")
    monkeypatch.setattr(experts._gradient_kernel, "configs", configs)
    assert_products(problem(COUNTS["many"], (70, 45)))


@pytest.mark.parametrize("tile", tiles.PRODUCT_TILES, ids=str)
def test_every_tile_of_the_products_of_blocks(tile, monkeypatch):
    monkeypatch.setattr(block_sparse._product_kernel, "configs", tiles.configurations([tile]))
    assert_products(problem(COUNTS["many"], (32, 64), (16, 32)))


@pytest.mark.parametrize("rows", [3, 6, 15, 28, 21])
def test_dense_gradients_of_some_experts_or_some_rows_of_one(rows, monkeypatch):
    case = problem(COUNTS["many"], (9, 11), (3, 1))
    monkeypatch.setattr(experts, "rows_per_chunk", lambda pattern: rows)
    covered = np.zeros(36, int)
    for first, count, height in experts._chunks(case[1], 4):
        assert height == 9 or count == 1
        assert count * height <= rows or rows < 9
        covered[first : first + count * height] += 1
    assert (covered == 1).all()
    assert_products(case)


def test_few_tiles_are_enough_for_any_split():
    generator = np.random.default_rng(0)
    for _ in range(300):
        counts = generator.integers(0, 40, generator.integers(2, 9)) * generator.integers(0, 2)
        for tile in (1, 16, 64):
            needed = sum(-(-int(count) // tile) for count in counts)  # the last one's are for no expert
            assert needed <= pieces.count_tiles(int(counts.sum()), len(counts) - 1, tile)


@FORMS
def test_what_the_products_do_not_read_stays_out(block_size, shape):
    alpha, pattern, values, bias, x, dy, ends = problem(COUNTS["some"], shape, block_size)
    want = exact(alpha, pattern, bias, x, dy, ends)
    values[pattern.active :] = float("nan")
    x[int(ends[-1]) :] = dy[int(ends[-1]) :] = float("nan")
    idle = (pattern.flat_index() // alpha[0].numel()) != 1  # of experts without rows
    values[idle] = float("nan")
    for got, wanted in zip(products(pattern, values, bias, x, dy, ends), want):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


@FORMS
def test_every_number_is_written_and_none_is_left_over_from_before(block_size, shape, monkeypatch):
    case = problem(COUNTS["some"], shape, block_size)

    def run():
        assert_products(case)
        return products(*case[1:])

    assert all(torch.equal(first, second) for first, second in zip(*runs_on_poisoned_memory(run, monkeypatch)))


def test_alpha_is_made_for_experts_that_have_rows():
    alpha, pattern, values, *_, ends = problem(([0, 5, 0, 2], 1), (7, 45), shares=(0.5, 0.5))
    made = expand.expand_active(values.fill_(2.0), pattern, values.dtype, ends)
    assert torch.equal(made.view_as(alpha)[[1, 3]], 2.0 * (alpha[[1, 3]] != 0))


@pytest.mark.skipif(not launch.INTERPRETED, reason="watches the interpreter's stores")
@FORMS
def test_no_two_programs_write_to_one_place(block_size, shape, monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter.interpreter_builder.create_masked_store
    original_call, written, launches = interpreter.GridExecutor.__call__, {}, []

    def store(self, pointers, values, mask, *rest):
        for place in set(pointers.data[mask.data].ravel().tolist()):
            written.setdefault(place, set()).add((len(launches), *self.grid_idx))
        return original(pointers, values, mask, *rest)

    def call(self, *arguments, **settings):
        launches.append(self)
        written.clear()
        original_call(self, *arguments, **settings)
        assert written and all(len(programs) == 1 for programs in written.values())

    monkeypatch.setattr(type(interpreter.interpreter_builder), "create_masked_store", store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    assert_products(problem(COUNTS["many"], shape, block_size))
    assert len(launches) >= 3


@pytest.mark.parametrize("block_size, shape", [((1, 1), (7, 45)), ((16, 16), (32, 48))], ids=str)
def test_inputs_need_not_be_contiguous_and_indices_may_be_wide(block_size, shape):
    _, pattern, values, bias, x, dy, ends = problem(COUNTS["some"], shape, block_size)
    wide = pattern._replace(row_offsets=pattern.row_offsets.long(), columns=pattern.columns.int())
    strange = values.repeat_interleave(2)[::2], bias.T.contiguous().T, x.T.contiguous().T, dy.T.contiguous().T
    got = products(wide, *strange, ends.repeat_interleave(2)[::2])
    for mine, want in zip(got, products(pattern, values, bias, x, dy, ends)):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("block_size, shape", [((1, 1), (7, 45)), ((16, 16), (32, 48))], ids=str)
def test_a_layer_and_its_gradients(block_size, shape, with_bias):
    _, pattern, values, bias, x, dy, ends = problem(COUNTS["some"], shape, block_size)

    def gradients(backend, product=grouped_linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, values, bias)]
        y = product(leaves[0], ends, leaves[1], pattern, leaves[2] if with_bias else None, backend)
        y.backward(dy)
        return y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)

    got = gradients("triton")
    assert len(got) == 3 + with_bias
    for mine, want in zip(got, gradients("reference"), strict=True):
        torch.testing.assert_close(mine, want)
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(mine, same) for mine, same in zip(gradients("triton", compiled), got, strict=True))
    with torch.no_grad():
        past_the_dispatcher = grouped_linear(x, ends, values, pattern, bias if with_bias else None, "triton")
    assert torch.equal(past_the_dispatcher, got[0])


@pytest.mark.parametrize("counts", ["some", "many", "none"])
def test_the_way_by_torchs_grouped_product(counts, monkeypatch):
    case = problem(COUNTS[counts], (16, 24), dtype=torch.bfloat16)
    assert experts.torch_does_not_wait(case[4], case[0]) == (
        DEVICE == "cuda" and torch.cuda.get_device_capability()[0] in (9, 10)
    )
    monkeypatch.setattr(experts, "torch_does_not_wait", lambda x, alpha: True)
    monkeypatch.setattr(experts, "_multiply", None)
    assert_products(case)
    assert_products((*case[:3], None, *case[4:]))


class OnGpu:
    """What is asked of an input of torch's grouped product, as if it were on a GPU."""

    is_cuda, device = True, None

    def __init__(self, dtype=torch.bfloat16, address=64):
        self.dtype, self.data_ptr, self.element_size = dtype, lambda: address, lambda: dtype.itemsize


def test_torchs_grouped_product_only_where_it_does_not_wait(monkeypatch):
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    matrices = torch.empty(4, 16, 24, device="meta")
    assert experts.torch_does_not_wait(OnGpu(), matrices)
    for other in (OnGpu(torch.float32), OnGpu(torch.float16), OnGpu(address=68), torch.empty(3, 24).bfloat16()):
        assert not experts.torch_does_not_wait(other, matrices)
    for shape in ((4, 12, 24), (4, 16, 20), (1024, 16, 24)):
        assert not experts.torch_does_not_wait(OnGpu(), torch.empty(shape, device="meta"))
    capability[0] = 12
    assert not experts.torch_does_not_wait(OnGpu(), matrices)


def test_a_gpu_gets_the_triton_kernels(monkeypatch):
    on_gpu = torch.empty(0, device="meta")
    assert grouped.runs_in_triton(on_gpu, "triton") and not grouped.runs_in_triton(on_gpu, "auto")
    monkeypatch.setattr(OnGpu, "device", torch.device("cuda"))
    assert grouped.runs_in_triton(OnGpu(), "auto") and not grouped.runs_in_triton(OnGpu(), "reference")
    monkeypatch.setattr(grouped, "has_triton", lambda: False)
    assert not grouped.runs_in_triton(OnGpu(), "auto")


def test_the_sizes_of_the_dense_gradient_keep_to_the_promise():
    pattern = problem(([1] * 8, 0), (16, 24))[1]
    limit = max(reference.MIN_CHUNK_ELEMENTS, pattern.numel / 4)
    assert all(count * height * 24 <= limit for _, count, height in experts._chunks(pattern, 8))
