"""
The products of patterns of blocks, on tensor cores: only the stored blocks are multiplied.

A line of the layer is one row of blocks (in dX, one column). The features that its blocks multiply stand side by side,
as if gathered, and are walked a tile at a time, whatever the blocks' own width; so small blocks share a product.

With `ends` the layer is one of experts, one below the other, and `x` rows sorted by expert: each program finds there
which one's rows it has. See `ops/grouped.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...storage import GRAIN, Pattern
from .pieces import add_product, count_tiles, rows_of_expert, rows_of_tile
from .tiles import (
    GRADIENT_KEY,
    GRADIENT_TILES,
    PRODUCT_KEY,
    PRODUCT_TILES,
    configurations,
    scale_of,
    tile_of,
    time_briefly,
    without_spills,
)


@triton.autotune(
    configurations(PRODUCT_TILES),
    key=PRODUCT_KEY,
    prune_configs_by=without_spills("TILE_TOKENS"),
    do_bench=time_briefly,
)
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
    ends,
    tokens,
    scale,
    lines,
    x_features,
    EXPERTS: tl.constexpr,
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
    tile = tl.program_id(0) // (lines * (SIDE_N // TILE_N))
    if ends is None:
        token = tile * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
        present = token[:, None] < tokens
        stored_line = line
        first = tl.load(begins + line).to(tl.int32)
        count = (tl.load(begins + line + 1).to(tl.int32) - first) * SIDE_K
    else:
        expert, first_token, last_token = rows_of_tile(tile, ends, tokens, EXPERTS, TILE_TOKENS)
        token = first_token + tl.arange(0, TILE_TOKENS)
        present = token[:, None] < last_token
        stored_line = expert * lines + line
        within = tl.minimum(stored_line, EXPERTS * lines - 1)
        first = tl.load(begins + within).to(tl.int32)
        count = (tl.load(begins + within + 1).to(tl.int32) - first) * SIDE_K
        count = tl.where(expert < EXPERTS, count, 0)  # rows for no expert: zeros
    x_lines = x + token[:, None].to(tl.int64) * x_features
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
        total = add_product(total, inputs, weights, PRECISION)
    if bias is not None:
        place = stored_line * SIDE_N + n
        offsets = tl.load(bias + place, mask=place < EXPERTS * lines * SIDE_N, other=0)
        total += offsets.to(tl.float32)[None, :]
    y_lines = y + token[:, None].to(tl.int64) * (lines * SIDE_N)
    tl.store(y_lines + line * SIDE_N + n[None, :], total.to(y.dtype.element_ty), mask=present)


@triton.autotune(
    configurations(GRADIENT_TILES), key=GRADIENT_KEY, prune_configs_by=without_spills("TILE_K"), do_bench=time_briefly
)
@triton.jit(do_not_specialize=["scale"])
def _gradient_kernel(
    dy,
    x,
    gradient,
    row_offsets,
    columns,
    ends,
    tokens,
    scale,
    out_features,
    in_features,
    EXPERTS: tl.constexpr,
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
        lines = out_features // HEIGHT
        output = line % lines * HEIGHT + n
        if ends is None:
            begin, end = 0, tokens
        else:
            begin, end = rows_of_expert(line // lines % EXPERTS, ends)
        total = tl.zeros((TILE_K, TILE_N), tl.float32)
        for first_token in tl.range(begin, end, TILE_TOKENS, num_stages=STAGES):
            token = (first_token + tl.arange(0, TILE_TOKENS))[:, None].to(tl.int64)
            present = token < end
            inputs = tl.load(x + token * in_features + feature[None, :], mask=present & exists[None, :], other=0)
            outer = tl.load(dy + token * out_features + output[None, :], mask=present, other=0)
            total = add_product(total, tl.trans(inputs), outer, PRECISION)
        places = (entry.to(tl.int64) * (HEIGHT * WIDTH) + k % WIDTH)[:, None] + n[None, :] * WIDTH
        tl.store(gradient + places, total.to(gradient.dtype.element_ty), mask=exists[:, None])


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, ends: Tensor | None = None) -> Tensor:
    """y = x·αᵀ + b: (tokens, in) → (tokens, out)."""
    shape = pattern.shape[0] // count_experts(ends), pattern.shape[1]
    return _multiply(x, values, bias, pattern.row_offsets, pattern.columns, None, ends, shape, pattern.block_size)


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern, ends: Tensor | None = None) -> Tensor:
    """dX = dY·α: (tokens, out) → (tokens, in)."""
    experts = count_experts(ends)
    lists = lists_by_columns(pattern, experts)
    shape = pattern.shape[1], pattern.shape[0] // experts
    return _multiply(dy, values, None, *lists, ends, shape, pattern.block_size[::-1])


def count_experts(ends: Tensor | None) -> int:
    """How many matrices stand one below the other."""
    return 1 if ends is None else len(ends)


def lists_by_columns(pattern: Pattern, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each column of blocks begins in two lists, and these: the blocks' rows, and where they are stored."""
    if experts > 1:
        walk = _walk_by_experts(pattern, experts)
    else:
        walk = pattern.walk_by_columns() if pattern.column_walk is None else pattern.column_walk
    columns, stored = experts * pattern.shape[1] // pattern.block_size[1], pattern.columns.numel()
    return walk.split([columns + 1, stored, stored])


def _walk_by_experts(pattern: Pattern, experts: int) -> Tensor:
    """
    The blocks of A column by column of each expert, as [`Pattern.walk_by_columns`] lists them, with the rows of blocks
    counted in each expert. It is made for one product: kept, it would have to follow the sets.
    """
    # The experts side by side instead of one below the other, on the diagonal of a larger matrix.
    lines, columns = (size // side for size, side in zip(pattern.shape, pattern.block_size))
    places = torch.arange(pattern.columns.numel(), dtype=pattern.row_offsets.dtype, device=pattern.columns.device)
    line = (torch.searchsorted(pattern.row_offsets, places, right=True) - 1) % lines
    moved = pattern.columns.int() + line.int() // (lines // experts) * columns
    diagonal = pattern._replace(columns=moved, shape=(pattern.shape[0], experts * pattern.shape[1]), column_walk=None)
    begins, rows, stored = diagonal.walk_by_columns().split([experts * columns + 1, len(places), len(places)])
    return torch.cat([begins, rows % (lines // experts), stored])


def _multiply(x, values, bias, begins, features, stored_at, ends, shape, block) -> Tensor:
    """
    x·mᵀ + b, for a block-sparse m of a shape, or that of each expert, given line by line.

    Blocks `begins[i]` to `begins[i + 1]` of the lists are those of line i, counted through all experts: `features`
    says which of x they multiply, counted in blocks, and `stored_at` where their values are; `None` if these stand in
    the order of the list.
    """
    (y_features, x_features), (side_n, side_k) = shape, block
    y = torch.empty(len(x), y_features, dtype=x.dtype, device=x.device)
    tile_n, lines, experts = tile_of(side_n), y_features // side_n, count_experts(ends)

    def grid(meta):
        tile = meta["TILE_TOKENS"]
        tiles = triton.cdiv(len(x), tile) if ends is None else count_tiles(len(x), experts, tile)
        return (tiles * (y_features // tile_n),)

    if y.numel():
        _product_kernel[grid](
            x,
            values,
            bias,
            y,
            begins,
            features,
            stored_at,
            ends,
            len(x),
            scale_of(len(x) // experts),
            lines,
            x_features,
            EXPERTS=experts,
            TRANSPOSED=stored_at is not None,
            SIDE_N=side_n,
            SIDE_K=side_k,
            PRECISION=precision(),
            TILE_N=tile_n,
            ALIGNED=GRAIN,
        )
    return y


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern, ends: Tensor | None = None) -> Tensor:
    """dW|B: (tokens, out), (tokens, in), of one dtype → (|B|,)."""
    height, width = pattern.block_size
    experts, in_features = count_experts(ends), pattern.shape[1]
    gradient = torch.empty(pattern.stored, dtype=x.dtype, device=x.device)
    tile_n = tile_of(height)

    def grid(meta):
        return (triton.cdiv(in_features, meta["TILE_K"]) * 2 * (pattern.shape[0] // tile_n),)

    _gradient_kernel[grid](
        dy,
        x,
        gradient,
        pattern.row_offsets,
        pattern.columns,
        ends,
        len(x),
        scale_of(len(x) // experts),
        pattern.shape[0] // experts,
        in_features,
        EXPERTS=experts,
        HEIGHT=height,
        WIDTH=width,
        PRECISION=precision(),
        TILE_N=tile_n,
    )
    return gradient


def precision() -> str:
    """Whether fp32 operands may be rounded to tf32, as `torch.set_float32_matmul_precision` says."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
