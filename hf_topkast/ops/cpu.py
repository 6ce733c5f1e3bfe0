"""
The masked products on CPUs: C++ kernels on the pattern's own arrays, for fp32 and bf16, sums in fp32.

This module chooses the sizes of the kernels' tiles and hands the tensors over. Results are bit-equal from run to run
for a given number of threads.

The instruction set is the best one of this CPU; `HF_TOPKAST_ISA=avx2` (or `portable`, or `avx512`) forces another.
"""

import os

import torch
from torch import Tensor

from ..native import _native, array, thread_count
from ..storage import Pattern
from .handover import as_rows, checked, structure


# Floats in a vector, by instruction set, of those this CPU can run; the best one first.
INSTRUCTION_SETS: dict[str, int] = dict(_native.instruction_sets())

isa: str = os.environ.get("HF_TOPKAST_ISA") or next(iter(INSTRUCTION_SETS))
if isa not in INSTRUCTION_SETS:
    raise ValueError(f"HF_TOPKAST_ISA={isa!r}: this CPU can run {', '.join(INSTRUCTION_SETS)}.")

# Vectors of a tile's line that the kernels keep in registers: powers of two up to this.
MAX_VECTORS = 8
# The same where four lines share their inputs, by floats in a vector: 32, 16 and 16 registers are to hold them.
STRIP_VECTORS = {16: 4, 8: 2, 4: 2}
# Sizes measured on an AVX-512 CPU (48 KB of first cache, 2 MB of second), with torch 2.13 and 2 threads.
# Floats of the inputs that the kernels read at random, which the innermost cache is to hold: more where entries are so
# few that the outputs' coming and going weighs more than that of the inputs.
PANEL, SPARSE_PANEL = 2**13, 2**14
# Tokens of a tile in those two cases, as far as the instruction set's registers hold a line of them.
LINE, SPARSE_LINE = 128, 64
SPARSE_DENSITY = 0.25
# Rows whose output lines stay in the second cache together.
ROW_GROUP = 1024
# Up to so many tokens the products go over an unstructured pattern as it is: cutting it into panels would not pay.
FEW_TOKENS = {"forward": 192, "grad_input": 128, "grad_values": 64}
# Up to so many the forward pass gathers the inputs of each row.
DOT_TOKENS = 3


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (..., in) → (..., out), in the dtype of `x`."""
    rows, values = as_rows(x, pattern.shape[1]), checked(values).contiguous()
    tokens = rows.shape[0]
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    y = x.new_empty(*x.shape[:-1], pattern.shape[0])
    common = structure(pattern), array(values), 0 if bias is None else bias.data_ptr()
    if tokens == 0:
        pass
    elif tokens <= DOT_TOKENS:
        rows, numbers = rows.float(), y.float()
        threads = thread_count(tokens * pattern.stored)  # of A only, but counting them takes longer
        _native.forward_dots(isa, threads, *common, tokens, rows.data_ptr(), numbers.data_ptr())
        if numbers is not y:
            y.copy_(numbers)
    elif _few("forward", tokens, pattern):
        for few, out in _tiles(rows, y):
            _native.forward_few(isa, _few_schedule(few, pattern), *common, len(few), array(few), array(out))
    else:
        schedule = _schedule(tokens, pattern, pattern.active, pattern.block_size[0])
        _native.forward(isa, schedule, *common, tokens, array(rows), array(y))
    return y


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (..., out) → (..., in), in the dtype of `dy`."""
    rows, values = as_rows(dy, pattern.shape[0]), checked(values).contiguous()
    dx = dy.new_empty(*dy.shape[:-1], pattern.shape[1])
    tokens, common = len(rows), (structure(pattern), array(values))
    if tokens == 0:
        pass
    elif _few("grad_input", tokens, pattern):
        for few, out in _tiles(rows, dx):
            _native.grad_input_few(isa, _few_schedule(few, pattern), *common, len(few), array(few), array(out))
    else:
        schedule = _schedule(tokens, pattern, pattern.active, pattern.block_size[1])
        _native.grad_input(isa, schedule, *common, tokens, array(rows), array(dx))
    return dx


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: the dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    outer, rows = as_rows(dy, pattern.shape[0]), as_rows(x, pattern.shape[1])
    gradient = x.new_empty(pattern.stored)
    if pattern.stored:
        tokens, common = len(rows), (structure(pattern), len(rows), array(outer), array(rows), array(gradient))
        if _few("grad_values", tokens, pattern):
            _native.grad_values_few(isa, _few_schedule(rows, pattern), *common)
        else:
            _native.grad_values(isa, _schedule(tokens, pattern, pattern.stored, 1), *common)
    return gradient


def _few(product: str, tokens: int, pattern: Pattern) -> bool:
    # A gradient sums over the tokens, which therefore have to fit into one tile.
    most = MAX_VECTORS * INSTRUCTION_SETS[isa] if product == "grad_values" else tokens
    return tokens <= min(most, FEW_TOKENS[product]) and pattern.block_size == (1, 1)


def _tiles(rows: Tensor, out: Tensor) -> zip:
    """Input and output, a tile of tokens at a time."""
    line = min(SPARSE_LINE, MAX_VECTORS * INSTRUCTION_SETS[isa])
    return zip(rows.split(line), out.view(len(rows), -1).split(line))


def _schedule(tokens: int, pattern: Pattern, entries: int, block_side: int) -> "_native.Schedule":
    """The sizes of tiles and panels for this many tokens and values, and the number of threads."""
    threads = thread_count(tokens * entries)
    dense = entries >= SPARSE_DENSITY * pattern.numel
    width = INSTRUCTION_SETS[isa]
    # The lines of outputs that share their inputs, four of them in blocks, are kept in registers together.
    most = MAX_VECTORS if block_side % 4 else STRIP_VECTORS[width]
    vectors = min(most, (LINE if dense else SPARSE_LINE) // width)
    while vectors > 1 and vectors * width * threads > tokens:  # rather a tile for each thread
        vectors //= 2
    panel = (PANEL if dense else SPARSE_PANEL) // (vectors * width)
    return _native.Schedule(_log2(vectors), _log2(panel), _log2(ROW_GROUP), threads)


def _few_schedule(rows: Tensor, pattern: Pattern) -> "_native.Schedule":
    """The smallest tile that holds the tokens."""
    width = INSTRUCTION_SETS[isa]
    vectors = next(n for n in (1, 2, 4, MAX_VECTORS) if n * width >= len(rows))
    return _native.Schedule(_log2(vectors), 0, 0, thread_count(len(rows) * pattern.stored))


def _log2(power: int) -> int:
    return power.bit_length() - 1
