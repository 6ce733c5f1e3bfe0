"""Features before and after the product of a layer whose blocks are scattered."""

import torch
from torch import Tensor

from ..block_order import inverse
from ..storage import reordered
from . import composite


def reorder(x: Tensor, stride: int) -> Tensor:
    """
    The last dimension in the order of a stride, see [`to_grid`]; differentiable in every way that the product is.

    Args:
        x (`torch.Tensor`): (..., features).
        stride (`int`): feature i of the result is feature i·stride modulo their number.

    Returns:
        `torch.Tensor`: (..., features).
    """
    plain = composite.is_needed() or torch.jit.is_tracing()  # which know no functions of Python
    if stride != 1 and torch.is_grad_enabled() and x.requires_grad and not plain:
        return _Reorder.apply(x, stride)
    return reordered(x, stride)


class _Reorder(torch.autograd.Function):
    """Its gradient is a reordering again, where that of `index_select` would be added up place by place."""

    @staticmethod
    def forward(ctx, x: Tensor, stride: int) -> Tensor:
        ctx.back = inverse(stride, int(x.shape[-1]))
        y = reordered(x, stride)
        return torch.ops.aten._unsafe_view(y, y.shape)  # no view of a local tensor: may be changed in place

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return reorder(dy, ctx.back), None
