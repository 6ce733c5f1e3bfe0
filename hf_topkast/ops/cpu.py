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

# Vectors of a tile's line that the kernels keep in registers: powers of two up to this.
MAX_VECTORS = 8
# Sizes measured on an AVX-512 CPU (48 KB of first cache, 2 MB of second), with torch 2.13 and 2 threads.
# Floats of the inputs that the kernels read at random, which the innermost cache is to hold: more where entries are so
# few that the outputs' coming and going weighs more than that of the inputs.
PANEL, SPARSE_PANEL = 2**13, 2**14
# Tokens of a tile in those two cases, as far as the instruction set's registers hold a line of them.
LINE, SPARSE_LINE = 128, 64
SPARSE_DENSITY = 0.25
# Rows whose output lines stay in the second cache together.
ROW_GROUP = 1024
# Above this share of B, dW in chunks of the dense product is faster than entry by entry.
DENSE_GRADIENT_DENSITY = 0.8
# The same for bf16 where the CPU multiplies bf16 tiles (AMX), 5–10 times as fast as dense fp32; and the share of A
# above which the other two products are faster with a dense α too.
AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
AMX_GRADIENT_DENSITY = 0.25
AMX_DENSITY = 0.08
# Up to so many tokens the products go over an unstructured pattern as it is: cutting it into panels would not pay.
FEW_TOKENS = {"forward": 192, "grad_input": 64, "grad_values": 64}
# Up to so many the forward pass gathers the inputs of each row.
DOT_TOKENS = 3
# Multiply-adds worth waking another thread for.
GRAIN = 2**15


def forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """y = x·αᵀ + b: (..., in) → (..., out), in the dtype of `x`."""
    rows, values = _as_rows(x, pattern.shape[1]), _checked(values).contiguous()
    tokens = rows.shape[0]
    if tokens > FEW_TOKENS["forward"] and _dense_is_faster(rows, pattern):
        return reference.forward(x, values.to(x.dtype), pattern, None if bias is None else bias.to(x.dtype))
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    y = x.new_empty(*x.shape[:-1], pattern.shape[0])
    common = _structure(pattern), _array(values), 0 if bias is None else bias.data_ptr()
    if tokens == 0:
        pass
    elif tokens <= DOT_TOKENS:
        rows, numbers = rows.float(), y.float()
        threads = _threads(tokens * pattern.stored)
        _native.forward_dots(isa, threads, *common, tokens, rows.data_ptr(), numbers.data_ptr())
        if numbers is not y:
            y.copy_(numbers)
    elif _few("forward", tokens, pattern):
        for few, out in _tiles(rows, y):
            _native.forward_few(isa, _few_schedule(few, pattern), *common, len(few), _array(few), _array(out))
    else:
        _native.forward(isa, _schedule(tokens, pattern), *common, tokens, _array(rows), _array(y))
    return y


def grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """dX = dY·α: (..., out) → (..., in), in the dtype of `dy`."""
    rows, values = _as_rows(dy, pattern.shape[0]), _checked(values).contiguous()
    if len(rows) > FEW_TOKENS["forward"] and _dense_is_faster(rows, pattern):
        return reference.grad_input(dy, values.to(dy.dtype), pattern)
    dx = dy.new_empty(*dy.shape[:-1], pattern.shape[1])
    tokens, common = len(rows), (_structure(pattern), _array(values))
    if tokens == 0:
        pass
    elif _few("grad_input", tokens, pattern):
        for few, out in _tiles(rows, dx):
            _native.grad_input_few(isa, _few_schedule(few, pattern), *common, len(few), _array(few), _array(out))
    else:
        _native.grad_input(isa, _schedule(tokens, pattern), *common, tokens, _array(rows), _array(dx))
    return dx


def grad_values(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """dW|B: the dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    outer, rows = _as_rows(dy, pattern.shape[0]), _as_rows(x, pattern.shape[1])
    limit = AMX_GRADIENT_DENSITY if AMX and x.dtype == dy.dtype == torch.bfloat16 else DENSE_GRADIENT_DENSITY
    if pattern.stored > limit * pattern.numel:
        return reference.grad_values(outer, rows, pattern)
    gradient = x.new_empty(pattern.stored)
    if pattern.stored:
        tokens, common = len(rows), (_structure(pattern), len(rows), _array(outer), _array(rows), _array(gradient))
        if _few("grad_values", tokens, pattern):
            _native.grad_values_few(isa, _few_schedule(rows, pattern), *common)
        else:
            _native.grad_values(isa, _schedule(tokens, pattern, pattern.stored), *common)
    return gradient


def _dense_is_faster(rows: Tensor, pattern: Pattern) -> bool:
    return AMX and rows.dtype == torch.bfloat16 and pattern.active > AMX_DENSITY * pattern.numel


def _few(product: str, tokens: int, pattern: Pattern) -> bool:
    # A gradient sums over the tokens, which therefore have to fit into one tile.
    most = MAX_VECTORS * INSTRUCTION_SETS[isa] if product == "grad_values" else tokens
    return tokens <= min(most, FEW_TOKENS[product]) and pattern.block_size == (1, 1)


def _tiles(rows: Tensor, out: Tensor) -> zip:
    """Input and output, a tile of tokens at a time."""
    line = min(SPARSE_LINE, MAX_VECTORS * INSTRUCTION_SETS[isa])
    return zip(rows.split(line), out.view(len(rows), -1).split(line))


def _schedule(tokens: int, pattern: Pattern, entries: int | None = None) -> "_native.Schedule":
    """The sizes of tiles and panels for this many tokens and values (defaults to |A|), and the number of threads."""
    entries = pattern.active if entries is None else entries
    threads = _threads(tokens * entries)
    dense = entries >= SPARSE_DENSITY * pattern.numel
    width = INSTRUCTION_SETS[isa]
    vectors = min(MAX_VECTORS, (LINE if dense else SPARSE_LINE) // width)
    while vectors > 1 and vectors * width * threads > tokens:  # rather a tile for each thread
        vectors //= 2
    panel = (PANEL if dense else SPARSE_PANEL) // (vectors * width)
    return _native.Schedule(_log2(vectors), _log2(panel), _log2(ROW_GROUP), threads)


def _few_schedule(rows: Tensor, pattern: Pattern) -> "_native.Schedule":
    """The smallest tile that holds the tokens."""
    width = INSTRUCTION_SETS[isa]
    vectors = next(n for n in (1, 2, 4, MAX_VECTORS) if n * width >= len(rows))
    return _native.Schedule(_log2(vectors), 0, 0, _threads(len(rows) * pattern.stored))


def _threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // GRAIN))


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _as_rows(tensor: Tensor, features: int) -> Tensor:
    if tensor.shape[-1] != features:
        raise ValueError(f"The last dimension of {tuple(tensor.shape)} is not the layer's {features}.")
    rows = tensor.numel() // features  # not -1, which 0 tokens leave open
    return _checked(tensor).reshape(rows, features).contiguous()


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
    arrays = _array(pattern.row_offsets), _array(pattern.columns)
    return _native.Pattern(*arrays, *pattern.shape, *pattern.block_size)
