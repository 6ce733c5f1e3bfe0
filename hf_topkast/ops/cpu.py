"""
The masked products on CPUs: C++ kernels on the pattern's own arrays, for fp32 and bf16, sums in fp32.

This module hands the tensors over; `native/ways.cpp` chooses kernels, tiles and threads. Results are bit-equal
from run to run for a given number of threads.

The instruction set is the best one of this CPU; `HF_TOPKAST_ISA=avx2` (or `portable`, or `avx512`) forces another.
"""

import os

import torch
from torch import Tensor

from ..native import _native, array
from ..storage import Pattern
from .handover import as_rows, checked, structure


# Floats in a vector, by instruction set, of those this CPU can run; the best one first.
INSTRUCTION_SETS: dict[str, int] = dict(_native.instruction_sets())

isa: str = os.environ.get("HF_TOPKAST_ISA") or next(iter(INSTRUCTION_SETS))
if isa not in INSTRUCTION_SETS:
    raise ValueError(f"HF_TOPKAST_ISA={isa!r}: this CPU can run {', '.join(INSTRUCTION_SETS)}.")


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (..., in) → (..., out), in the dtype of `x`."""
    rows, values = as_rows(x, pattern.shape[1]), checked(values).contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    y = x.new_empty(*x.shape[:-1], pattern.shape[0])
    common = structure(pattern), array(values), 0 if bias is None else bias.data_ptr()
    _native.masked_forward(isa, torch.get_num_threads(), *common, len(rows), array(rows), array(y))
    return y


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (..., out) → (..., in), in the dtype of `dy`."""
    rows, values = as_rows(dy, pattern.shape[0]), checked(values).contiguous()
    dx = dy.new_empty(*dy.shape[:-1], pattern.shape[1])
    common = structure(pattern), array(values), len(rows)
    _native.masked_grad_input(isa, torch.get_num_threads(), *common, array(rows), array(dx))
    return dx


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: the dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    outer, rows = as_rows(dy, pattern.shape[0]), as_rows(x, pattern.shape[1])
    gradient = x.new_empty(pattern.stored)
    common = structure(pattern), len(rows)
    _native.masked_grad_values(isa, torch.get_num_threads(), *common, array(outer), array(rows), array(gradient))
    return gradient
