"""
The masked products through a dense α of one layer at a time, for where dense products are faster: many weights, bf16
on a CPU with matrix units, few tokens. In C++ α is made, and gradients are read at B, at the speed of memory.

Like the reference it keeps the memory promise: the dense gradient of a large layer is made a few rows at a time.
"""

import torch
from torch import Tensor

from ..native import _native, array, thread_count
from ..storage import Pattern
from .handover import as_rows, checked, structure
from .reference import rows_per_chunk


def expand_active(values: Tensor, pattern: Pattern) -> Tensor:
    """α: the values of A at their places, zero elsewhere. Dense, (out, in)."""
    values = checked(values).contiguous()
    alpha = values.new_empty(pattern.shape)
    _native.expand(structure(pattern), array(values), array(alpha), thread_count(alpha.numel()))
    return alpha


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (..., in) → (..., out), in the dtype of `x`."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, expand_active(values.to(x.dtype), pattern), bias)


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (..., out) → (..., in), in the dtype of `dy`."""
    return dy @ expand_active(values.to(dy.dtype), pattern)


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: the dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    dy, x = as_rows(dy, pattern.shape[0]).to(x.dtype), as_rows(x, pattern.shape[1])
    gradient = x.new_empty(pattern.stored)
    rows = rows_per_chunk(pattern)
    for first in range(0, dy.shape[1], rows):
        dense = dy[:, first : first + rows].mT @ x
        place = structure(pattern), first, len(dense), array(dense), array(gradient)
        _native.gather(*place, thread_count(dense.numel()))
    return gradient
