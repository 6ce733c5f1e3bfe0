"""
The masked products on GPUs, in Triton: fp32, bf16 and fp16, sums in fp32.

Blocks whose sides are multiples of 16 are multiplied as they are (`block_sparse.py`, and on new GPUs `large_blocks.py`
for those of 64 and more); any other pattern, and float64, goes through a dense α of one layer at a time (`expand.py`),
which saves memory and no time. With `ends` the pattern holds one matrix of each expert of a block, and inputs are
(rows, in), sorted by expert: see `ops/grouped.py`.

No product waits for the GPU, and none keeps anything between calls: what layers keep, and change in its place at
refreshes, a CUDA graph reads anew at each replay. With TRITON_INTERPRET=1, set before Triton is imported, the kernels
run on the CPU in its interpreter.
"""

import torch
from torch import Tensor

from ...storage import Pattern
from . import block_sparse, expand, experts, large_blocks
from .launch import as_rows, fetches_tiles, on_device


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, ends: Tensor | None = None) -> Tensor:
    """y = x·αᵀ + b: (..., in) → (..., out), in the dtype of `x`."""
    rows = as_rows(x, pattern.shape[1])
    bias = None if bias is None else bias.contiguous()
    with on_device(x):
        y = _kernels(x, pattern, ends).forward(rows, values.contiguous(), pattern, bias, *_given(ends))
    return y.view(*x.shape[:-1], y.shape[1])


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern, ends: Tensor | None = None) -> Tensor:
    """dX = dY·α: (..., out) → (..., in), in the dtype of `dy`."""
    rows = as_rows(dy, pattern.shape[0] // block_sparse.count_experts(ends))
    with on_device(dy):
        dx = _kernels(dy, pattern, ends).grad_input(rows, values.contiguous(), pattern, *_given(ends))
    return dx.view(*dy.shape[:-1], pattern.shape[1])


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern, ends: Tensor | None = None) -> Tensor:
    """dW|B: the dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    outer = as_rows(dy, pattern.shape[0] // block_sparse.count_experts(ends)).to(x.dtype)
    with on_device(x):
        return _kernels(x, pattern, ends).grad_values(outer, as_rows(x, pattern.shape[1]), pattern, *_given(ends))


def _kernels(x: Tensor, pattern: Pattern, ends: Tensor | None):
    if pattern.fills_tiles and x.dtype != torch.float64:
        return large_blocks if fetches_tiles(x) else block_sparse
    return expand if ends is None else experts


def _given(ends: Tensor | None) -> list[Tensor]:
    return [] if ends is None else [ends.contiguous()]
