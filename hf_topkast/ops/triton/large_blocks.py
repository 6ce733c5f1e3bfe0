"""
The products of patterns of large blocks in bf16 and fp16, where every tile lies inside one block.

So a tile's place is one number, read once, and tiles are fetched by tensor descriptors: a unit of GPUs of compute
capability 9.0 and later copies them without its threads. What does not fit here, `block_sparse.py` multiplies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...storage import Pattern
from . import block_sparse
from .block_sparse import count_experts
from .pieces import add_product, count_tiles, rows_of_tile
from .tiles import (
    LARGE_GRADIENT_KEY,
    LARGE_PRODUCT_KEY,
    large_gradient_configurations,
    large_product_configurations,
    scale_of,
    tile_of,
    time_briefly,
)


# Sides of blocks are multiples of it, for forward and dX; of the sides of dW's tiles, for dW.
SIDE, GRADIENT_SIDE = 64, 128
# Where a descriptor's tensor may begin, in bytes.
ALIGNMENT = 16


@triton.autotune(large_product_configurations(), key=LARGE_PRODUCT_KEY, do_bench=time_briefly)
@triton.jit(do_not_specialize=["scale"], do_not_specialize_on_alignment=["begins", "features", "stored_at"])
def _product_kernel(
    x,
    values,
    bias,
    y,
    begins,
    features,
    stored_at,
    ends,
    tokens,
    scale,
    lines,
    EXPERTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `block_sparse`'s: a tile of tokens times the blocks of one line, or of `TILE_N` of its outputs."""
    # Lines next to each other share the tokens, which stay in the second cache meanwhile.
    outputs = tl.program_id(0) % (lines * (SIDE_N // TILE_N))
    line = outputs // (SIDE_N // TILE_N)
    n = outputs % (SIDE_N // TILE_N) * TILE_N
    tile = tl.program_id(0) // (lines * (SIDE_N // TILE_N))
    if ends is None:
        stored_line = line
        first_token, last_token = tile * TILE_TOKENS, tokens
        exists = True
    else:
        expert, first_token, last_token = rows_of_tile(tile, ends, tokens, EXPERTS, TILE_TOKENS)
        stored_line = tl.minimum(expert, EXPERTS - 1) * lines + line
        exists = expert < EXPERTS
    first = tl.load(begins + stored_line).to(tl.int32)
    count = (tl.load(begins + stored_line + 1).to(tl.int32) - first) * (SIDE_K // TILE_K)
    count = tl.where(exists, count, 0)  # rows for no expert: zeros
    total = tl.zeros((TILE_TOKENS, TILE_N), tl.float32)
    # The walk by columns goes through the pipeline too, which then keeps the tiles not as far ahead.
    for step in tl.range(0, count, num_stages=STAGES + 2 * TRANSPOSED):
        entry = first + step // (SIDE_K // TILE_K)
        part = step % (SIDE_K // TILE_K) * TILE_K
        inputs = x.load([first_token, tl.load(features + entry).to(tl.int32) * SIDE_K + part])
        if TRANSPOSED:
            weights = values.load([tl.load(stored_at + entry).to(tl.int32) * SIDE_K + part, n])
        else:
            weights = values.load([entry * SIDE_N + n, part]).T
        total = add_product(total, inputs, weights, "tf32")
    output = n + tl.arange(0, TILE_N)
    if bias is not None:
        offsets = tl.load(bias + stored_line * SIDE_N + output).to(tl.float32)
        total += tl.where(exists, offsets, 0.0)[None, :]
    token = first_token + tl.arange(0, TILE_TOKENS)
    places = y + token[:, None].to(tl.int64) * (lines * SIDE_N) + (line * SIDE_N + output)[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=token[:, None] < last_token)


@triton.jit
def _feature(columns, first, tile, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Where the tile of a number in a line begins among the inputs."""
    block = tl.load(columns + first + tile // (WIDTH // TILE)).to(tl.int32)
    return block * WIDTH + tile % (WIDTH // TILE) * TILE


@triton.jit
def _store_tile(gradient, total, first, tile, count, n, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Writes the tile of a number in a line, if the line has so many."""
    if tile < count:
        block = (first + tile // (WIDTH // TILE)).to(tl.int64) * (HEIGHT * WIDTH)
        rows, columns = n + tl.arange(0, TILE), tile % (WIDTH // TILE) * TILE + tl.arange(0, TILE)
        places = rows[:, None] * WIDTH + columns[None, :]
        tl.store(gradient + block + places, total.to(gradient.dtype.element_ty))


@triton.autotune(large_gradient_configurations(GRADIENT_SIDE), key=LARGE_GRADIENT_KEY, do_bench=time_briefly)
@triton.jit(do_not_specialize=["scale"])
def _gradient_kernel(
    dy,
    x,
    gradient,
    row_offsets,
    columns,
    tokens,
    scale,
    out_features,
    in_features,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TOGETHER: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of one tile, or of two that stand side by side in a line of A or B\\A and share dY."""
    # As many programs as a full line needs: how long each one is only the GPU knows, and most have nothing to do.
    programs = tl.cdiv(in_features // TILE, TOGETHER)
    tile = tl.program_id(0) % programs * TOGETHER
    outputs = tl.program_id(0) // programs
    line = outputs // (HEIGHT // TILE)
    n = outputs % (HEIGHT // TILE) * TILE
    first = tl.load(row_offsets + line).to(tl.int32)
    count = (tl.load(row_offsets + line + 1).to(tl.int32) - first) * (WIDTH // TILE)
    if tile < count:
        output = line % (out_features // HEIGHT) * HEIGHT + n
        feature = _feature(columns, first, tile, WIDTH, TILE)
        total = tl.zeros((TILE, TILE), tl.float32)
        if TOGETHER == 2:
            second_feature = _feature(columns, first, tl.minimum(tile + 1, count - 1), WIDTH, TILE)
            second = tl.zeros((TILE, TILE), tl.float32)
        for token in tl.range(0, tokens, TILE_TOKENS, num_stages=STAGES):
            outer = dy.load([token, output]).T
            total = add_product(total, outer, x.load([token, feature]), "tf32")
            if TOGETHER == 2:
                second = add_product(second, outer, x.load([token, second_feature]), "tf32")
        _store_tile(gradient, total, first, tile, count, n, HEIGHT, WIDTH, TILE)
        if TOGETHER == 2:
            _store_tile(gradient, second, first, tile + 1, count, n, HEIGHT, WIDTH, TILE)


def fits(pattern: Pattern, side: int, *operands: Tensor) -> bool:
    """Whether tiles of a side lie in the blocks, and descriptors can fetch them from the operands."""
    return all(length % side == 0 for length in pattern.block_size) and all(
        tensor.dtype in (torch.bfloat16, torch.float16) and tensor.numel() and tensor.data_ptr() % ALIGNMENT == 0
        for tensor in operands
    )


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, ends: Tensor | None = None) -> Tensor:
    """y = x·αᵀ + b: (tokens, in) → (tokens, out)."""
    values = values.to(x.dtype)
    if not fits(pattern, SIDE, x, values):
        return block_sparse.forward(x, values, pattern, bias, ends)
    out_features = pattern.shape[0] // count_experts(ends)
    return _multiply(
        x, values, bias, pattern.row_offsets, pattern.columns, None, ends, out_features, pattern.block_size
    )


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern, ends: Tensor | None = None) -> Tensor:
    """dX = dY·α: (tokens, out) → (tokens, in)."""
    values = values.to(dy.dtype)
    if not fits(pattern, SIDE, dy, values):
        return block_sparse.grad_input(dy, values, pattern, ends)
    lists = block_sparse.lists_by_columns(pattern, count_experts(ends))
    return _multiply(dy, values, None, *lists, ends, pattern.shape[1], pattern.block_size[::-1])


def _multiply(x, values, bias, begins, features, stored_at, ends, y_features, block) -> Tensor:
    """x·mᵀ + b, as `block_sparse` says it."""
    side_n, side_k = block
    y = torch.empty(len(x), y_features, dtype=x.dtype, device=x.device)
    tile_n, lines, experts = tile_of(side_n), y_features // side_n, count_experts(ends)

    def grid(meta):
        tile = meta["TILE_TOKENS"]
        tiles = triton.cdiv(len(x), tile) if ends is None else count_tiles(len(x), experts, tile)
        return (tiles * (y_features // tile_n),)

    _product_kernel[grid](
        _describe(x),
        _describe(values.view(-1, side_k if stored_at is None else side_n)),
        bias,
        y,
        begins,
        features,
        stored_at,
        ends,
        len(x),
        scale_of(len(x) // experts),
        lines,
        EXPERTS=experts,
        TRANSPOSED=stored_at is not None,
        SIDE_N=side_n,
        SIDE_K=side_k,
        TILE_N=tile_n,
    )
    return y


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern, ends: Tensor | None = None) -> Tensor:
    """dW|B: (tokens, out), (tokens, in), of one dtype → (|B|,)."""
    if ends is not None or not fits(
        pattern, GRADIENT_SIDE, dy, x
    ):  # a tile of tokens would run into the next expert's
        return block_sparse.grad_values(dy, x, pattern, ends)
    (out_features, in_features), (height, width) = pattern.shape, pattern.block_size
    gradient = torch.empty(pattern.stored, dtype=x.dtype, device=x.device)

    def grid(meta):
        return (triton.cdiv(in_features // GRADIENT_SIDE, meta["TOGETHER"]) * 2 * (out_features // GRADIENT_SIDE),)

    _gradient_kernel[grid](
        _describe(dy),
        _describe(x),
        gradient,
        pattern.row_offsets,
        pattern.columns,
        len(x),
        scale_of(len(x)),
        out_features,
        in_features,
        HEIGHT=height,
        WIDTH=width,
        TILE=GRADIENT_SIDE,
    )
    return gradient


def _describe(matrix: Tensor) -> TensorDescriptor:
    """A descriptor of a contiguous matrix; each configuration sets the tile."""
    return TensorDescriptor.from_tensor(matrix, [SIDE, SIDE])
