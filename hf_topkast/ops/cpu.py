"""
The masked products on CPUs: C++ kernels on the pattern's own arrays, for fp32 and bf16, sums in fp32.

The extension knows nothing of torch: this module checks and prepares the tensors, chooses the sizes of the kernels'
tiles, and hands over addresses. Its threads are those of torch's own OpenMP pool, `torch.get_num_threads()` of them.
Results are bit-equal from run to run for a given number of threads.

The instruction set is the best one of this CPU; `HF_TOPKAST_ISA=avx2` (or `portable`, or `avx512`) forces another.
"""

import os

import torch
from torch import Tensor

from ..pattern import Pattern
from . import _native, reference


DTYPES = (torch.float32, torch.bfloat16)

# Floats in a vector, by instruction set, of those this CPU can run; the best one first.
INSTRUCTION_SETS: dict[str, int] = dict(_native.instruction_sets())

isa: str = os.environ.get("HF_TOPKAST_ISA") or next(iter(INSTRUCTION_SETS))
if isa not in INSTRUCTION_SETS:
    raise ValueError(f"HF_TOPKAST_ISA={isa!r}: this CPU can run {', '.join(INSTRUCTION_SETS)}.")

# Of the innermost cache, what the lines of inputs that the kernels read at random may fill, in floats.
PANEL = 2**13
# Multiply-adds worth waking another thread for.
GRAIN = 2**18
# Rows whose output lines stay in the second cache together.
ROW_GROUP = 1024
# Above this share of B, dW in chunks of the dense product is faster than entry by entry.
DENSE_GRADIENT_DENSITY = 0.45


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (..., in) → (..., out), in the dtype of `x`."""
    rows = _as_rows(x, pattern.in_features)
    values = _checked(values).contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    y = x.new_empty(*x.shape[:-1], pattern.out_features)
    if y.numel():
        schedule = _schedule(rows.shape[0], pattern)
        bias_address = 0 if bias is None else bias.data_ptr()
        _native.forward(
            isa, schedule, _structure(pattern), _array(rows), rows.shape[0], _array(values), bias_address, _array(y)
        )
    return y


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (..., out) → (..., in), in the dtype of `dy`."""
    rows = _as_rows(dy, pattern.out_features)
    values = _checked(values).contiguous()
    dx = dy.new_empty(*dy.shape[:-1], pattern.in_features)
    if dx.numel():
        schedule = _schedule(rows.shape[0], pattern)
        _native.grad_input(isa, schedule, _structure(pattern), _array(rows), rows.shape[0], _array(values), _array(dx))
    return dx


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: the dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    if pattern.columns.numel() > DENSE_GRADIENT_DENSITY * pattern.numel:
        return reference.grad_values(dy, x, pattern)
    outer, rows = _as_rows(dy, pattern.out_features), _as_rows(x, pattern.in_features)
    gradient = x.new_empty(pattern.columns.numel())
    if gradient.numel():
        schedule = _schedule(rows.shape[0], pattern)
        _native.grad_values(
            isa, schedule, _structure(pattern), _array(outer), _array(rows), rows.shape[0], _array(gradient)
        )
    return gradient


def _schedule(tokens: int, pattern: Pattern) -> "_native.Schedule":
    threads = max(1, min(torch.get_num_threads(), tokens * pattern.columns.numel() // GRAIN))
    width = INSTRUCTION_SETS[isa]
    vectors = min(8, 64 // width)
    return _native.Schedule(vectors.bit_length() - 1, PANEL // (vectors * width), ROW_GROUP, threads)


def _as_rows(tensor: Tensor, features: int) -> Tensor:
    if tensor.shape[-1] != features:
        raise ValueError(f"The last dimension of {tuple(tensor.shape)} is not the layer's {features}.")
    return _checked(tensor).reshape(-1, features).contiguous()


def _checked(tensor: Tensor) -> Tensor:
    if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        raise TypeError(
            f"backend='cpu' multiplies float32 and bfloat16 tensors on the CPU, not {tensor.dtype} on "
            f"{tensor.device}; backend='auto' chooses by tensor."
        )
    return tensor


def _array(tensor: Tensor) -> "_native.Array":
    return _native.Array(tensor.data_ptr(), tensor.element_size())


def _structure(pattern: Pattern) -> "_native.Pattern":
    arrays = (pattern.row_offsets, pattern.active_counts, pattern.columns)
    return _native.Pattern(*map(_array, arrays), *pattern.shape)
