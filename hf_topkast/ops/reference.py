"""
The masked products in plain torch, on any device and for any floating dtype: the oracle, and the fallback.

It keeps the memory promise of the package: α of one layer exists during one product only, and the dense gradient is
made a few rows at a time and read at B, so n gradient numbers never exist at once. It does not save time.
"""

import torch
from torch import Tensor

from ..pattern import Pattern


# Rows of the dense gradient that exist at once, as a share of the layer. An eighth costs no time against a whole
# product on the shapes of a transformer block, and the floor keeps small layers in one or two products.
GRADIENT_CHUNK = 1 / 8
MIN_CHUNK_ELEMENTS = 2**16


def expand_active(values: Tensor, pattern: Pattern) -> Tensor:
    """α: the values of A at their places, zero elsewhere. Dense, (out, in)."""
    alpha = values.new_zeros(pattern.numel)
    alpha[pattern.flat_index()] = torch.where(pattern.active_slots(), values, values.new_zeros(()))
    return alpha.view(pattern.shape)


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (..., in) → (..., out)."""
    return torch.nn.functional.linear(x, expand_active(values, pattern), bias)


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (..., out) → (..., in)."""
    return dy @ expand_active(values, pattern)


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: the dense-formula gradient dYᵀX read at the slots of B. (..., out), (..., in) → (|B|,)."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    gradient = x.new_empty(pattern.columns.numel())
    flat = pattern.flat_index()
    rows = _rows_per_chunk(pattern)
    starts = range(0, pattern.out_features, rows)
    offsets = [*pattern.row_offsets[::rows].tolist(), gradient.numel()]
    for start, first, last in zip(starts, offsets, offsets[1:]):
        chunk = dy[:, start : start + rows].mT @ x
        torch.index_select(chunk.view(-1), 0, flat[first:last] - start * pattern.in_features, out=gradient[first:last])
    return gradient


def _rows_per_chunk(pattern: Pattern) -> int:
    elements = max(MIN_CHUNK_ELEMENTS, int(pattern.numel * GRADIENT_CHUNK))
    return max(1, min(pattern.out_features, elements // max(1, pattern.in_features)))
