"""
The products of unstructured patterns and small blocks: through a dense α of one layer at a time, multiplied by cuBLAS.

Tensor cores multiply a dense α faster than anything that skips single weights of it at densities above a few per cent.
So the sparse work here is at the speed of memory: α is written once, zeros included, and dW is read at B from a few
rows of the dense gradient at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...storage import Pattern
from ..reference import rows_per_chunk
from .pieces import rows_of_expert


TILE = 1024


@triton.jit
def _run(block_row, row_offsets, WIDTH: tl.constexpr):
    """Of one row of the layer, which is kept in `block_row`: its first block, and how many weights it has."""
    first = tl.load(row_offsets + block_row)
    return first, (tl.load(row_offsets + block_row + 1) - first).to(tl.int32) * WIDTH


@triton.jit
def _places(first, row, index, exists, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Column and slot of the weights numbered `index` of a run."""
    block = first + index // WIDTH
    column = tl.load(columns + block, mask=exists, other=0).to(tl.int32) * WIDTH + index % WIDTH
    return column, block.to(tl.int64) * (HEIGHT * WIDTH) + (row % HEIGHT) * WIDTH + index % WIDTH


@triton.jit
def _expand_kernel(
    values,
    alpha,
    row_offsets,
    columns,
    ends,
    out_features,
    in_features,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row of α. If it is that of an expert without rows of input, nobody will read it."""
    row = tl.program_id(0)
    if ends is not None:
        begin, end = rows_of_expert(row // out_features, ends)
        if begin == end:
            return
    line = alpha + row.to(tl.int64) * in_features
    zeros = tl.zeros((TILE,), alpha.dtype.element_ty)
    for start in range(0, in_features, TILE):
        place = start + tl.arange(0, TILE)
        tl.store(line + place, zeros, mask=place < in_features)
    tl.debug_barrier()  # other threads wrote these zeros than will write the weights over them
    first, count = _run(row // HEIGHT, row_offsets, WIDTH)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        exists = index < count
        column, slot = _places(first, row, index, exists, columns, HEIGHT, WIDTH)
        weight = tl.load(values + slot, mask=exists, other=0)
        tl.store(line + column, weight.to(alpha.dtype.element_ty), mask=exists)


@triton.jit
def _gather_kernel(
    dense,
    gradient,
    row_offsets,
    columns,
    first_row,
    block_rows,
    in_features,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """The weights that A (program axis 1 at 0) or B\\A (at 1) holds in one row of the dense gradient."""
    line = tl.program_id(0)
    row = first_row + line
    first, count = _run(tl.program_id(1) * block_rows + row // HEIGHT, row_offsets, WIDTH)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        exists = index < count
        column, slot = _places(first, row, index, exists, columns, HEIGHT, WIDTH)
        numbers = tl.load(dense + line.to(tl.int64) * in_features + column, mask=exists, other=0)
        tl.store(gradient + slot, numbers.to(gradient.dtype.element_ty), mask=exists)


def expand_active(values: Tensor, pattern: Pattern, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
    """
    α: the values of A at their places, zero elsewhere. Dense, (out, in), in `dtype`. With `ends`, of experts one below
    the other, those without rows are left out: whatever is in memory.
    """
    alpha = torch.empty(pattern.shape, dtype=dtype, device=values.device)
    arrays = values, alpha, pattern.row_offsets, pattern.columns, ends
    sizes = pattern.shape[0] // (1 if ends is None else len(ends)), pattern.shape[1], *pattern.block_size
    _expand_kernel[(pattern.shape[0],)](*arrays, *sizes, TILE=TILE)
    return alpha


def gather_stored(dense: Tensor, gradient: Tensor, pattern: Pattern, first: int):
    """Writes those of the numbers of some rows, from the row `first` on, that `pattern` stores to their slots."""
    arrays = dense, gradient, pattern.row_offsets, pattern.columns
    sizes = first, pattern.shape[0] // pattern.block_size[0], pattern.shape[1], *pattern.block_size
    _gather_kernel[(len(dense), 2)](*arrays, *sizes, TILE=TILE)


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (tokens, in) → (tokens, out)."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, expand_active(values, pattern, x.dtype), bias)


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (tokens, out) → (tokens, in)."""
    return dy @ expand_active(values, pattern, dy.dtype)


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: (tokens, out), (tokens, in), of one dtype → (|B|,)."""
    gradient = torch.empty(pattern.stored, dtype=x.dtype, device=x.device)
    rows = rows_per_chunk(pattern)
    for first in range(0, pattern.shape[0], rows):
        gather_stored(dy[:, first : first + rows].mT @ x, gradient, pattern, first)
    return gradient
