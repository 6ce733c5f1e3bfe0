"""
The products of patterns of blocks, on tensor cores: only the stored blocks are multiplied.

A line of the layer is one row of blocks (in dX, one column). The features that its blocks multiply stand side by side,
as if gathered, and are walked a tile at a time, whatever the blocks' own width; so small blocks share a product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...storage import GRAIN, Pattern
from .launch import INTERPRETED
from .tiles import (
    GRADIENT_KEY,
    GRADIENT_TILES,
    PRODUCT_KEY,
    PRODUCT_TILES,
    configurations,
    scale_of,
    tile_of,
    without_spills,
)


WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def _add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a·b."""
    if WIDEN:  # the interpreter would multiply the bits of bf16; in fp32 the products are those of a tensor core
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.autotune(configurations(PRODUCT_TILES), key=PRODUCT_KEY, prune_configs_by=without_spills("TILE_TOKENS"))
# Lists that lie in one tensor begin anywhere.
@triton.jit(do_not_specialize=["scale"], do_not_specialize_on_alignment=["begins", "features", "stored_at"])
def _product_kernel(
    x,
    values,
    bias,
    y,
    begins,
    features,
    stored_at,
    tokens,
    scale,
    lines,
    x_features,
    TRANSPOSED: tl.constexpr,
    SIDE_N: tl.constexpr,
    SIDE_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of tokens times the blocks of one line, or of `TILE_N` of the `SIDE_N` outputs that a line has."""
    # Lines next to each other share the tokens, which stay in the second cache meanwhile.
    outputs = tl.program_id(0) % (lines * (SIDE_N // TILE_N))
    line = outputs // (SIDE_N // TILE_N)
    n = (outputs % (SIDE_N // TILE_N)) * TILE_N + tl.arange(0, TILE_N)
    token = tl.program_id(0) // (lines * (SIDE_N // TILE_N)) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    present = token[:, None] < tokens
    x_lines = x + token[:, None].to(tl.int64) * x_features
    first = tl.load(begins + line).to(tl.int32)
    count = (tl.load(begins + line + 1).to(tl.int32) - first) * SIDE_K
    total = tl.zeros((TILE_TOKENS, TILE_N), tl.float32)
    # The walk by columns, in 32 bits, goes through the pipeline too, which then keeps the operands half as far ahead.
    for start in tl.range(0, count, TILE_K, num_stages=STAGES + 2 * TRANSPOSED):
        k = start + tl.arange(0, TILE_K)
        exists = k < count
        entry = first + k // SIDE_K
        feature = tl.load(features + entry, mask=exists, other=0).to(tl.int32) * SIDE_K + k % SIDE_K
        feature = tl.max_contiguous(tl.multiple_of(feature, ALIGNED), ALIGNED)
        inputs = tl.load(x_lines + feature[None, :], mask=present & exists[None, :], other=0)
        if TRANSPOSED:
            block = tl.load(stored_at + entry, mask=exists, other=0).to(tl.int64) * (SIDE_N * SIDE_K)
            places = (block + k % SIDE_K * SIDE_N)[:, None] + n[None, :]
        else:
            block = entry.to(tl.int64) * (SIDE_N * SIDE_K)
            places = (block + k % SIDE_K)[:, None] + n[None, :] * SIDE_K
        weights = tl.load(values + places, mask=exists[:, None], other=0).to(inputs.dtype)
        total = _add_product(total, inputs, weights, PRECISION)
    if bias is not None:
        total += tl.load(bias + line * SIDE_N + n).to(tl.float32)[None, :]
    y_lines = y + token[:, None].to(tl.int64) * (lines * SIDE_N)
    tl.store(y_lines + line * SIDE_N + n[None, :], total.to(y.dtype.element_ty), mask=present)


@triton.autotune(configurations(GRADIENT_TILES), key=GRADIENT_KEY, prune_configs_by=without_spills("TILE_K"))
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
    PRECISION: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of `TILE_K` features, as they stand side by side in a line of A or B\\A, at `TILE_N` outputs."""
    # As many programs as a full line needs: how long each one is only the GPU knows, and most have nothing to do.
    tiles = tl.cdiv(in_features, TILE_K)
    start = tl.program_id(0) % tiles * TILE_K
    outputs = tl.program_id(0) // tiles
    line = outputs // (HEIGHT // TILE_N)
    n = (outputs % (HEIGHT // TILE_N)) * TILE_N + tl.arange(0, TILE_N)
    first = tl.load(row_offsets + line).to(tl.int32)
    count = (tl.load(row_offsets + line + 1).to(tl.int32) - first) * WIDTH
    if start < count:
        k = start + tl.arange(0, TILE_K)
        exists = k < count
        entry = first + k // WIDTH
        feature = tl.load(columns + entry, mask=exists, other=0).to(tl.int32) * WIDTH + k % WIDTH
        output = line % (out_features // HEIGHT) * HEIGHT + n
        total = tl.zeros((TILE_K, TILE_N), tl.float32)
        for first_token in tl.range(0, tokens, TILE_TOKENS, num_stages=STAGES):
            token = (first_token + tl.arange(0, TILE_TOKENS))[:, None].to(tl.int64)
            present = token < tokens
            inputs = tl.load(x + token * in_features + feature[None, :], mask=present & exists[None, :], other=0)
            outer = tl.load(dy + token * out_features + output[None, :], mask=present, other=0)
            total = _add_product(total, tl.trans(inputs), outer, PRECISION)
        places = (entry.to(tl.int64) * (HEIGHT * WIDTH) + k % WIDTH)[:, None] + n[None, :] * WIDTH
        tl.store(gradient + places, total.to(gradient.dtype.element_ty), mask=exists[:, None])


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (tokens, in) → (tokens, out)."""
    rows = pattern.row_offsets, pattern.columns, None
    return _multiply(x, values, bias, *rows, pattern.shape, pattern.block_size)


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (tokens, out) → (tokens, in)."""
    walk = pattern.walk_by_columns() if pattern.column_walk is None else pattern.column_walk
    columns, stored = pattern.shape[1] // pattern.block_size[1], pattern.columns.numel()
    lists = walk.split([columns + 1, stored, stored])
    return _multiply(dy, values, None, *lists, pattern.shape[::-1], pattern.block_size[::-1])


def _multiply(x, values, bias, begins, features, stored_at, shape, block) -> Tensor:
    """
    x·mᵀ + b, for a block-sparse m of a shape, given line by line.

    Blocks `begins[i]` to `begins[i + 1]` of the lists are those of line i: `features` says which of x they multiply,
    counted in blocks, and `stored_at` where their values are; `None` if these stand in the order of the list.
    """
    (y_features, x_features), (side_n, side_k) = shape, block
    y = torch.empty(len(x), y_features, dtype=x.dtype, device=x.device)
    tile_n, lines = tile_of(side_n), y_features // side_n

    def grid(meta):
        return (triton.cdiv(len(x), meta["TILE_TOKENS"]) * (y_features // tile_n),)

    if y.numel():
        _product_kernel[grid](
            x,
            values,
            bias,
            y,
            begins,
            features,
            stored_at,
            len(x),
            scale_of(len(x)),
            lines,
            x_features,
            TRANSPOSED=stored_at is not None,
            SIDE_N=side_n,
            SIDE_K=side_k,
            PRECISION=precision(),
            TILE_N=tile_n,
            ALIGNED=GRAIN,
        )
    return y


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: (tokens, out), (tokens, in), of one dtype → (|B|,)."""
    (out_features, in_features), (height, width) = pattern.shape, pattern.block_size
    gradient = torch.empty(pattern.stored, dtype=x.dtype, device=x.device)
    tile_n = tile_of(height)

    def grid(meta):
        return (triton.cdiv(in_features, meta["TILE_K"]) * 2 * (out_features // tile_n),)

    _gradient_kernel[grid](
        dy,
        x,
        gradient,
        pattern.row_offsets,
        pattern.columns,
        len(x),
        scale_of(len(x)),
        out_features,
        in_features,
        HEIGHT=height,
        WIDTH=width,
        PRECISION=precision(),
        TILE_N=tile_n,
    )
    return gradient


def precision() -> str:
    """Whether fp32 operands may be rounded to tf32, as `torch.set_float32_matmul_precision` says."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
