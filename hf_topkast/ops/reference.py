"""
The masked products in plain torch, on any device and for any floating dtype: the oracle, and the fallback.

It keeps the memory promise of the package: α of one layer exists during one product only, and the dense gradient is
read at B and gone, for large layers a few rows at a time. It does not save time.
"""

import torch
from torch import Tensor

from ..storage import Pattern


# How much of the dense gradient exists at once: a quarter of the layer, or so many elements (16 MiB in float32) where
# that is more, since a product in parts takes up to a third longer.
GRADIENT_CHUNK = 1 / 4
MIN_CHUNK_ELEMENTS = 2**22


def expand_active(values: Tensor, pattern: Pattern) -> Tensor:
    """α: the values of A at their places, zero elsewhere. Dense, (out, in)."""
    alpha = values.new_zeros(pattern.numel)
    alpha[pattern.flat_index()[: pattern.active]] = values[: pattern.active]
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
    gradient = x.new_empty(pattern.stored)
    flat = pattern.flat_index()
    (out_features, in_features), (height, width) = pattern.shape, pattern.block_size
    slots = [offset * height * width for offset in pattern.row_offsets.tolist()]
    rows = rows_per_chunk(pattern)
    for start in range(0, out_features, rows):
        end = min(start + rows, out_features)
        chunk = (dy[:, start:end].mT @ x).view(-1)
        for base in (0, out_features // height):  # the rows of A, then those of B\A
            part = slice(slots[base + start // height], slots[base + end // height])
            torch.index_select(chunk, 0, flat[part] - start * in_features, out=gradient[part])
    return gradient


def rows_per_chunk(pattern: Pattern) -> int:
    """How many rows of the dense gradient exist at once: whole rows of blocks."""
    elements = max(MIN_CHUNK_ELEMENTS, int(pattern.numel * GRADIENT_CHUNK))
    height = pattern.block_size[0]
    return max(1, elements // max(1, pattern.shape[1] * height)) * height
