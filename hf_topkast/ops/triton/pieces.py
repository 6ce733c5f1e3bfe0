"""Pieces that several kernels share, and which experts' rows their programs have."""

import triton
import triton.language as tl

from .launch import INTERPRETED


WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """total + a·b."""
    if WIDEN and a.dtype.primitive_bitwidth == 16:
        # The interpreter would multiply the bits of bf16; in fp32 the products are those of a tensor core.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def rows_of_tile(tile, ends, rows, EXPERTS: tl.constexpr, TILE: tl.constexpr):
    """
    The rows that the tile of a number begins with, as (expert, first row, end of the expert's rows).

    No tile has rows of two experts. Tiles are numbered in the order of rows, and those past the last expert's end are
    of an expert `EXPERTS` that is none. Numbers that are left over get that one, and no rows.
    """
    # A power of two that has a place for the rows past the last end, too.
    ROOM: tl.constexpr = triton.next_power_of_2(EXPERTS + 1)
    expert = tl.arange(0, ROOM)
    end = tl.load(ends + expert, mask=expert < EXPERTS, other=rows)
    begin = tl.load(ends + expert - 1, mask=(expert > 0) & (expert <= EXPERTS), other=0)
    begin = tl.where(expert > EXPERTS, rows, begin)
    tiles = (end - begin + TILE - 1) // TILE
    before = tl.cumsum(tiles, 0) - tiles
    own = (before <= tile) & (tile < before + tiles)
    first = tl.sum(tl.where(own, begin + (tile - before) * TILE, 0), 0)
    last = tl.sum(tl.where(own, end, 0), 0)
    found = tl.sum(tl.where(own, expert, 0), 0)
    return tl.where(last > 0, found, EXPERTS), first, last


@triton.jit
def rows_of_expert(expert, ends):
    """The first row of an expert, and their end."""
    return tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)


def count_tiles(rows: int, experts: int, tile: int) -> int:
    """How many tiles rows may need, whichever experts they are for: which only the GPU knows."""
    return min(rows, triton.cdiv(rows, tile) + experts)
