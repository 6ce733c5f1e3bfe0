"""
Blocks whose rows lie far apart in the layer, and side by side only where its sets are kept.

Neighbours among the outputs of a layer have much in common: they are of one head, or one part of the residual stream,
which the layers after cut at the same borders. Where the rows of a block are neighbours, groups of features share
their fate from layer to layer, and their paths hardly cross. So the grid of blocks takes the outputs in another
order: its row i is output i·stride modulo their number, with a stride that is an irrational share of it, which spreads
any run of rows over the whole layer (Weyl's sequence). Such an order takes no memory, and its inverse is like it.

That an order of its own for each layer makes up for what blocks lose is PA-DST's finding (arXiv 2510.14812), which
learns them.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


# The golden ratio's: its multiples stay farther apart than any other's.
SHARE = (math.sqrt(5) - 1) / 2


def row_stride(out_features: int, height: int, scatter: bool) -> int:
    """
    The order of the rows of a matrix in its grid of blocks.

    Args:
        out_features (`int`): how many rows it has.
        height (`int`): those of a block.
        scatter (`bool`): whether blocks are scattered.

    Returns:
        `int`: row i of the grid is output i·stride modulo their number; 1 where blocks are of neighbours.
    """
    if not scatter or height == 1:
        return 1
    nearest = round(SHARE * out_features)
    steps = (nearest + sign * distance for distance in range(out_features + 1) for sign in (1, -1))
    return next(step for step in steps if step > 0 and math.gcd(step, out_features) == 1)


def inverse(stride: int, count: int) -> int:
    """The stride that takes so many features back out of the order of this one."""
    return pow(stride, -1, count) if stride != 1 else 1


def to_grid(rows: Tensor, stride: int, matrices: int = 1) -> Tensor:
    """A weight or a mask, (out, in), with its rows in the order of the grid; of experts each by itself."""
    return rows if stride == 1 else reordered(rows.unflatten(0, (matrices, -1)), stride, dim=1).flatten(0, 1)


def from_grid(grid: Tensor, stride: int, matrices: int = 1) -> Tensor:
    """The inverse of [`to_grid`]."""
    return to_grid(grid, inverse(stride, grid.shape[0] // matrices), matrices)


def reordered(x: Tensor, stride: int, dim: int = -1) -> Tensor:
    """
    Features in the order of a stride.

    Args:
        x (`torch.Tensor`): any type and shape.
        stride (`int`): feature i of the result is feature i·stride modulo their number; 1 leaves all as it is.
        dim (`int`, *optional*, defaults to -1): where the features are.

    Returns:
        `torch.Tensor`: of the shape of `x`; `x` itself, if there is nothing to do.
    """
    return x if stride == 1 else x.index_select(dim, _order(x, stride, dim))


def _order(x: Tensor, stride: int, dim: int) -> Tensor:
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or x.is_meta:  # numbers that are of that moment
        return _multiples(x.shape[dim], stride, x.device)
    return _kept_multiples(int(x.shape[dim]), stride, x.device)


@lru_cache(maxsize=256)
def _kept_multiples(count: int, stride: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # or it could not be used outside
        return _multiples(count, stride, device)


def _multiples(count: int, stride: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * stride % count
