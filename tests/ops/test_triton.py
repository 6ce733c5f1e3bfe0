"""The Triton kernels against the dense masked product: on a GPU if there is one, else in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from poisoned_memory import runs_on_poisoned_memory
from torch.utils.checkpoint import checkpoint

from hf_topkast import TopKastController, ops, sparsify
from hf_topkast.ops import masked_linear, reference
from hf_topkast.sets.selection import top_mask
from hf_topkast.storage import Pattern, spread_blocks


triton = pytest.importorskip("triton", reason="Triton is not installed")

from hf_topkast.ops.triton import (  # noqa: E402
    block_sparse,
    expand,
    forward,
    grad_input,
    grad_values,
    large_blocks,
    launch,
    tiles,
)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = (0, 1, 3, 33, 100)
SHARES = {"sparse": (0.3, 0.6), "no exploration": (0.3, 0.3), "full": (1.0, 1.0), "empty": (0.0, 0.0)}
SMALL_BLOCKS = [(1, 1), (4, 1), (1, 3), (3, 5), (8, 16)]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (128, 32), (48, 16), (16, 96)]


def problem(shape, tokens, shares=(0.3, 0.6), dtype=torch.float32, seed=0, block_size=(1, 1)):
    """α, pattern, values, bias, x, dY. Of blocks, row 0 and column 1 are empty; row 1 is full in A, row 2 in B\\A."""
    generator = torch.Generator().manual_seed(seed)
    height, width = block_size
    draw = torch.rand(shape[0] // height, shape[1] // width, generator=generator)
    active, backward = draw < shares[0], draw < shares[1]
    if 0 < shares[0] < 1:
        active[:, 1:2] = backward[:, 1:2] = False
        active[2:3], backward[2:3] = False, shares[0] < shares[1]
        active[1:2] = backward[1:2] = True
        active[0] = backward[0] = False
    active, backward = (mask.repeat_interleave(height, 0).repeat_interleave(width, 1) for mask in (active, backward))

    def normal(*size):
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    theta, bias = normal(*shape), normal(shape[0])
    pattern = Pattern.from_masks(active.to(DEVICE), backward.to(DEVICE), block_size)
    values = theta.flatten()[pattern.flat_index()]
    return theta * active.to(DEVICE), pattern, values, bias, normal(tokens, shape[1]), normal(tokens, shape[0])


def exact(alpha, pattern, bias, x, dy):
    """The three products by the dense formulas, in float64."""
    alpha, bias, x, dy = (tensor.double() for tensor in (alpha, bias, x, dy))
    return x @ alpha.T + bias, dy @ alpha, (dy.T @ x).flatten()[pattern.flat_index()]


def products(pattern, values, bias, x, dy):
    return forward(x, values, pattern, bias), grad_input(dy, values, pattern), grad_values(dy, x, pattern)


def assert_products(case):
    alpha, pattern, values, bias, x, dy = case
    rounding = torch.finfo(x.dtype).eps
    for got, want in zip(products(pattern, values, bias, x, dy), exact(alpha, pattern, bias, x, dy)):
        assert got.dtype == x.dtype and got.shape == want.shape
        atol = 4 * max(rounding, 1e-6) * max(*alpha.shape, len(x)) ** 0.5
        torch.testing.assert_close(got.double(), want, rtol=2 * rounding, atol=atol)


def layer_shape(block_size):
    """A few rows and columns of blocks: few, for the interpreter is slow."""
    return max(4, 6 // block_size[0]) * block_size[0], max(3, 40 // block_size[1]) * block_size[1]


@pytest.mark.parametrize("block_size", SMALL_BLOCKS + BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_equal_the_dense_masked_ones(block_size, dtype):
    assert_products(problem(layer_shape(block_size), 33, dtype=dtype, block_size=block_size))


@pytest.mark.parametrize("block_size", [(1, 1), (16, 16), (32, 64)])
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens_and_any_sets(block_size, shares, tokens):
    assert_products(problem(layer_shape(block_size), tokens, shares, block_size=block_size))


@settings(max_examples=12, deadline=None)
@given(
    sides=st.tuples(st.sampled_from([1, 2, 16, 32]), st.sampled_from([1, 3, 16, 48])),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tokens=st.integers(0, 70),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 10**6),
)
def test_random_patterns(sides, grid, tokens, shares, seed):
    shape = tuple(side * count for side, count in zip(sides, grid))
    assert_products(problem(shape, tokens, sorted(shares), seed=seed, block_size=sides))


@pytest.mark.parametrize("tile", tiles.PRODUCT_TILES, ids=str)
def test_every_tile_of_the_block_products(tile, monkeypatch):
    monkeypatch.setattr(block_sparse._product_kernel, "configs", tiles.configurations([tile]))
    assert_products(problem((96, 256), 70, block_size=(32, 16)))
    assert_products(problem((48, 256), 70, block_size=(16, 64), dtype=torch.bfloat16))


@pytest.mark.parametrize("tile", tiles.GRADIENT_TILES, ids=str)
def test_every_tile_of_the_block_gradients(tile, monkeypatch):
    monkeypatch.setattr(block_sparse._gradient_kernel, "configs", tiles.configurations([tile]))
    assert_products(problem((96, 256), 70, block_size=(32, 16)))
    assert_products(problem((48, 256), 70, block_size=(16, 64), dtype=torch.bfloat16))


LARGE_BLOCKS = [(64, 64), (128, 128), (64, 192), (192, 64), (256, 128), (128, 256)]


def kernels_used(monkeypatch) -> list[str]:
    """Notes the modules whose kernels are launched."""
    used = []
    for name, kernels in {"large": large_blocks, "any": block_sparse}.items():
        for attribute in ("_product_kernel", "_gradient_kernel"):
            kernel = getattr(kernels, attribute)
            noting = {"__getitem__": lambda self, grid, name=name, kernel=kernel: used.append(name) or kernel[grid]}
            monkeypatch.setattr(kernels, attribute, type("Noting", (), noting)())
    return used


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("block_size", LARGE_BLOCKS)
def test_large_blocks(block_size, shares, monkeypatch):
    used = kernels_used(monkeypatch)
    shape = 3 * block_size[0], 3 * block_size[1]
    for tokens in (0, 1, 150):
        assert_products(problem(shape, tokens, shares, torch.bfloat16, block_size=block_size))
    if shares[1]:
        assert used[-3:] == ["large", "large", "large" if min(block_size) >= 128 else "any"]


@pytest.mark.parametrize("tile", tiles.LARGE_PRODUCT_TILES, ids=str)
def test_every_tile_of_the_products_of_large_blocks(tile, monkeypatch):
    monkeypatch.setattr(tiles, "LARGE_PRODUCT_TILES", [tile])
    monkeypatch.setattr(large_blocks._product_kernel, "configs", tiles.large_product_configurations())
    assert_products(problem((256, 384), 140, dtype=torch.bfloat16, block_size=(64, 128)))


@pytest.mark.parametrize("tile", tiles.LARGE_GRADIENT_TILES, ids=str)
def test_every_tile_of_the_gradients_of_large_blocks(tile, monkeypatch):
    monkeypatch.setattr(tiles, "LARGE_GRADIENT_TILES", [tile])
    configurations = tiles.large_gradient_configurations(large_blocks.GRADIENT_SIDE)
    monkeypatch.setattr(large_blocks._gradient_kernel, "configs", configurations)
    assert_products(problem((256, 768), 140, dtype=torch.float16, block_size=(128, 256)))


def test_operands_that_descriptors_cannot_fetch(monkeypatch):
    used = kernels_used(monkeypatch)
    _, pattern, values, bias, x, dy = problem((256, 256), 20, dtype=torch.bfloat16, block_size=(128, 128))

    def shifted(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    want = products(pattern, values, bias, x, dy)
    assert used == ["large"] * 3
    for got, wanted in zip(products(pattern, values, bias, shifted(x), shifted(dy)), want):
        torch.testing.assert_close(got, wanted)
    assert used[3:] == ["any"] * 3


@pytest.mark.parametrize("name", ["PRODUCT_TILES", "GRADIENT_TILES"])
def test_tiles_that_would_spill_are_left_out(name):
    side = 0 if name == "PRODUCT_TILES" else 1
    prune = tiles.without_spills("TILE_TOKENS" if side == 0 else "TILE_K")["early_config_prune"]
    settings = getattr(tiles, name)
    configs = [
        triton.Config({"TILE_TOKENS": tokens, "TILE_K": features, "STAGES": stages}, num_warps=warps)
        for tokens, features, warps, stages in settings
    ]

    def kept(dtype, precision, tile_n):
        return prune(configs, {"x": torch.empty(0, dtype=dtype)}, TILE_N=tile_n, PRECISION=precision, SIDE_N=1)

    for tile_n in (16, 32, 64, 128):
        assert kept(torch.bfloat16, "ieee", tile_n) == kept(torch.float32, "tf32", tile_n) == configs
        left = kept(torch.float32, "ieee", tile_n)
        sums = [setting[side] * tile_n / (32 * setting[2]) for setting in settings]
        assert left == [config for config, count in zip(configs, sums) if count <= 64] != []
    assert len(left) < len(configs)


def test_rows_longer_than_a_tile():
    assert_products(problem((4, 2 * expand.TILE + 5), 3))
    assert_products(problem((8, 2 * expand.TILE), 3, block_size=(4, 2)))


@pytest.mark.parametrize("elements", [1, 200, 300])
@pytest.mark.parametrize("block_size", [(1, 1), (4, 2)])
def test_gradients_in_chunks(elements, block_size, monkeypatch):
    monkeypatch.setattr(reference, "MIN_CHUNK_ELEMENTS", elements)
    case = problem((16, 40), 3, block_size=block_size)
    assert reference.rows_per_chunk(case[1]) < 16
    assert_products(case)


@pytest.mark.parametrize("block_size", [(1, 1), (16, 32)])
def test_float64_and_each_operand_of_its_own_dtype(block_size):
    alpha, pattern, values, bias, x, dy = problem(layer_shape(block_size), 5, block_size=block_size)
    wide = products(pattern, values.double(), bias.double(), x.double(), dy.double())
    for got, want in zip(wide, exact(alpha, pattern, bias, x, dy)):
        torch.testing.assert_close(got, want)
    mixed = products(pattern, values.bfloat16(), bias.bfloat16(), x, dy)
    same = products(pattern, values.bfloat16().float(), bias.bfloat16().float(), x, dy)
    assert all(torch.equal(got, want) for got, want in zip(mixed, same))


@pytest.mark.parametrize("block_size", [(1, 1), (16, 16)])
def test_all_index_types_give_the_same_numbers(block_size):
    _, pattern, *operands = problem(layer_shape(block_size), 5, block_size=block_size)
    wide = Pattern(pattern.row_offsets.long(), pattern.columns.int(), pattern.shape, block_size)
    for got, want in zip(products(wide, *operands), products(pattern, *operands)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("block_size", [(1, 1), (16, 16)])
def test_inputs_need_not_be_contiguous(block_size):
    _, pattern, values, bias, x, dy = problem(layer_shape(block_size), 12, block_size=block_size)
    strange = (
        values.repeat_interleave(2)[::2],
        bias.repeat_interleave(3)[::3].contiguous(),
        x.T.contiguous().T,
        dy.expand(2, *dy.shape)[1].T.contiguous().T,
    )
    for got, want in zip(products(pattern, *strange), products(pattern, values, bias, x, dy)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("block_size", [(1, 1), (16, 16)])
def test_what_the_layer_does_not_read_stays_out(block_size):
    alpha, pattern, values, bias, x, dy = problem(layer_shape(block_size), 20, block_size=block_size)
    values[pattern.active :] = float("nan")
    torch.testing.assert_close(forward(x, values, pattern, bias), x @ alpha.T + bias)
    torch.testing.assert_close(grad_input(dy, values, pattern), dy @ alpha)


@pytest.mark.parametrize("block_size", [(1, 1), (3, 2), (16, 32), (128, 16)])
def test_every_number_is_written_and_none_is_left_over_from_before(block_size, monkeypatch):
    case = problem(layer_shape(block_size), 33, block_size=block_size)

    def run():
        assert_products(case)
        return products(*case[1:])

    assert all(torch.equal(first, second) for first, second in zip(*runs_on_poisoned_memory(run, monkeypatch)))


@pytest.mark.skipif(not launch.INTERPRETED, reason="watches the interpreter's loads and stores")
@pytest.mark.parametrize("block_size", [(1, 1), (3, 2), (16, 32), (128, 16)])
def test_no_two_programs_touch_what_one_of_them_writes(block_size, monkeypatch):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.interpreter_builder
    read, written = {}, {}
    launches = []

    def watch(name, ledger):
        original = getattr(type(builder), name)

        def watched(self, pointers, *rest):
            mask = next(part for part in rest if getattr(part.data, "dtype", None) == np.dtype(bool))
            places = set(pointers.data[mask.data].ravel().tolist())
            for place in places:
                ledger.setdefault(place, set()).add((len(launches), *self.grid_idx))
            return original(self, pointers, *rest)

        monkeypatch.setattr(type(builder), name, watched)

    original_call = interpreter.GridExecutor.__call__

    def call(self, *arguments, **settings):
        launches.append(self)
        read.clear(), written.clear()
        original_call(self, *arguments, **settings)
        assert written
        for place, programs in written.items():
            assert len(programs | read.get(place, set())) == 1

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    watch("create_masked_store", written)
    watch("create_masked_load", read)
    assert_products(problem(layer_shape(block_size), 33, block_size=block_size))
    assert len(launches) >= 3


@pytest.mark.parametrize("block_size", [(1, 1), (16, 16)])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0)])
def test_a_layer_and_its_gradients(block_size, leading):
    _, pattern, values, bias, *_ = problem(layer_shape(block_size), 1, block_size=block_size)
    x = torch.randn(*leading, pattern.shape[1], device=DEVICE)
    weights = torch.randn(*leading, pattern.shape[0], device=DEVICE)

    def gradients(backend, run=lambda layer, x: layer(x)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, values, bias)]
        y = run(lambda x: masked_linear(x, leaves[1], pattern, leaves[2], backend), leaves[0])
        (y * weights).sum().backward()
        return y.detach(), *(leaf.grad for leaf in leaves)

    got = gradients("triton")
    for mine, want in zip(got, gradients("reference")):
        torch.testing.assert_close(mine, want)
    again = gradients("triton", lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(mine, want) for mine, want in zip(again, got))


@pytest.mark.parametrize("block_size", [(1, 1), (16, 16)])
def test_compiled_and_under_autocast(block_size):
    _, pattern, values, bias, x, _ = problem(layer_shape(block_size), 5, block_size=block_size)
    values.requires_grad_()
    x.requires_grad_()

    def run(function):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = function(x, values, pattern, bias, "triton")
        return y, *torch.autograd.grad(y.float().square().sum(), (x, values))

    compiled = torch.compile(masked_linear, backend="aot_eager", fullgraph=True)
    results = run(masked_linear), run(compiled)
    assert results[0][0].dtype == torch.bfloat16 and results[0][2].dtype == torch.float32
    assert all(torch.equal(first, second) for first, second in zip(*results))


@pytest.mark.parametrize("block_size", [[1, 1], [16, 16]])
def test_a_model_trains_as_with_the_reference(block_size):
    def train(backend):
        torch.manual_seed(0)
        width = 4 * block_size[0]  # few rows: the interpreter is slow
        model = torch.nn.Sequential(torch.nn.Linear(48, width), torch.nn.Tanh(), torch.nn.Linear(width, width)).to(
            DEVICE
        )
        settings = {"target_modules": ["0", "2"], "block_size": block_size, "backend": backend}
        sparsify(model, density=0.5, refresh_every=2, **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        TopKastController(model, optimizer)
        for _ in range(3):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model[0].theta(), loss

    x = torch.randn(7, 48, device=DEVICE)
    for got, want in zip(train("triton"), train("reference")):
        torch.testing.assert_close(got, want)


def test_a_layer_makes_its_walk_by_columns_at_refreshes_only(monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 64)).to(DEVICE)
    sparsify(model, density=0.3, backward_density=0.5, block_size=16, target_modules=["0"], backend="triton")
    layer, x = model[0], torch.randn(5, 96, device=DEVICE, requires_grad=True)
    former = layer.column_walk.clone()
    draw = torch.rand(4, 6, device=DEVICE)
    active, backward = (spread_blocks(top_mask(draw, size), (16, 16)) for size in (7, 12))
    layer.reassign(active, backward)
    assert not torch.equal(layer.column_walk, former)
    monkeypatch.setattr(Pattern, "walk_by_columns", None)
    dy = torch.randn(5, 64, device=DEVICE)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    torch.testing.assert_close(dx, dy @ (layer.theta() * active))


def test_a_gpu_gets_the_triton_kernels(monkeypatch):
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert ops.implementation("auto", "forward", on_gpu, None) is ops.load_backend("triton")
    monkeypatch.setattr(ops, "has_triton", lambda: False)
    assert ops.implementation("auto", "forward", on_gpu, None) is ops.reference


def test_tensors_of_the_cpu_are_refused_where_nothing_interprets(monkeypatch):
    _, pattern, values, bias, x, _ = problem((4, 40), 5)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"on a GPU.*cpu.*auto"):
        forward(x.cpu(), values, pattern, bias)
    with pytest.raises(ValueError, match="not the layer's 4"):
        grad_input(x, values, pattern)


@pytest.mark.parametrize(("precision", "dot"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_tf32_only_where_torch_allows_it(precision, dot):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert block_sparse.precision() == dot
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    # The interpreter runs what the compiler refuses, and the other way about.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), "90"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind, unit", [("bf16", "f32.bf16.bf16"), ("tf32", "f32.tf32.tf32")])
def test_every_tile_of_blocks_fits_a_gpu_and_uses_its_tensor_cores(loaded, kind, unit):
    for name, kernels in loaded[f"{kind} blocks"].items():
        choice = tiles.GRADIENT_TILES if name == "grad_values" else tiles.PRODUCT_TILES
        assert len(kernels) == len(choice)
        for (tokens, *_), kernel in zip(choice, kernels):
            assert unit in kernel
            assert "cp.async" in kernel  # loads run ahead of the products
            if tokens >= 64:
                assert "wgmma" in kernel  # by four warps together, straight from shared memory


@pytest.mark.slow
def test_every_tile_of_large_blocks_fits_a_gpu_that_fetches_them_by_descriptors(loaded):
    for name, kernels in loaded["bf16 large blocks"].items():
        choice = tiles.LARGE_GRADIENT_TILES if name == "grad_values" else tiles.LARGE_PRODUCT_TILES
        assert len(kernels) == len(choice)
        assert all("wgmma" in kernel and "cp.async.bulk.tensor" in kernel for kernel in kernels)


@pytest.mark.slow
def test_zeros_are_written_before_the_weights_over_them(loaded):
    (expand,) = loaded["bf16 single"]["forward"]
    assert loaded["bf16 single"]["grad_input"] == []  # the same
    _, _, after_zeros = expand.partition("st.global")
    assert "bar.sync" in after_zeros.partition("ld.global")[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "tf32"])
@pytest.mark.parametrize("form", ["blocks", "large blocks", "single"])
def test_other_sets_compile_and_tune_nothing(loaded, kind, form):
    assert loaded[f"{kind} {form}"]["grad_values"]
    assert loaded[f"{kind} {form} refreshed"] == {"forward": [], "grad_input": [], "grad_values": []}
