"""Weights and features in the order of the grid of scattered blocks, see [`hf_topkast.block_order`], and back."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..block_order import inverse


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
    if stride == 1:
        return x
    order = _order(x, stride, dim)
    if dim not in (-1, x.ndim - 1):
        return x.index_select(dim, order)
    rows = x.reshape(-1, x.shape[-1])  # of more dimensions index_select takes ten times as long on a CPU
    return rows.gather(1, order.expand(rows.shape)).view(x.shape)


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
