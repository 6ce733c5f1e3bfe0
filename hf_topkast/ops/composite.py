"""
The masked products by ordinary operations of torch, which torch can differentiate any number of times, in either mode,
and batch: for `torch.func`, dual numbers and second derivatives, where the operators would have no formula.

To all of them α is one function of the values: those of A at their places, and for B\\A zeros that pass derivatives
straight through (the paper's §2.2). Each product makes α of its layer dense, and keeps it where its own derivative
needs it: right, not fast.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..storage import Pattern


def is_needed() -> bool:
    """Whether derivatives may be wanted that the operators do not have: of `torch.func`, or by dual numbers."""
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def in_forward_mode() -> bool:
    """Whether there may be dual numbers, of `torch.autograd.forward_ad` or of `torch.func`."""
    return forward_ad._current_level >= 0  # there is no public way to ask: -1 is outside of `dual_level()`


def expand_active(values: Tensor, pattern: Pattern) -> Tensor:
    """α, (out, in): dense, the values of A at their places, zero elsewhere; its derivative is that of all of B."""
    active = pattern.row_offsets[len(pattern.row_offsets) // 2] * (pattern.block_size[0] * pattern.block_size[1])
    in_active = torch.arange(len(values), device=values.device) < active  # not read: vmap may run over patterns
    straight_through = torch.where(in_active, values, values - values.detach())
    return values.new_zeros(pattern.numel).scatter(0, pattern.flat_index(), straight_through).view(pattern.shape)


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (..., in) → (..., out), in the dtype of `x`."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, expand_active(values.to(x.dtype), pattern), bias)


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (..., out) → (..., in), in the dtype of `dy`."""
    return dy @ expand_active(values.to(dy.dtype), pattern)


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: the dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    outer, rows = dy.reshape(-1, dy.shape[-1]).to(x.dtype), x.reshape(-1, x.shape[-1])
    return (outer.mT @ rows).flatten()[pattern.flat_index()]
