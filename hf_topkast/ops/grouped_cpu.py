"""
The masked products of experts on CPUs, in fp32 and bf16: the C++ extension goes over the experts that have rows, and
shares them out among threads.

For each expert it chooses between the sparse kernels and a dense product as `costs.py` does for a layer, by the number
of its rows. What is left to dense products is done here, with α or the dense gradient of one expert at a time.
"""

import torch
from torch import Tensor

from ..native import _native, array, thread_count
from ..storage import Pattern
from . import costs, cpu
from .crossovers import TOKENS
from .handover import DTYPES, as_rows, checked, structure
from .reference import rows_per_chunk


BACKENDS = ("auto", "cpu", "expanded")


def is_for(backend: str, *operands: Tensor) -> bool:
    """Whether these products are done here: on the CPU, of types that the extension knows."""
    return backend in BACKENDS and all(tensor.is_cpu and tensor.dtype in DTYPES for tensor in operands)


def forward(x: Tensor, ends: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, backend: str) -> Tensor:
    """y = x·αₑᵀ + bₑ: (rows, in) → (rows, out), in the dtype of `x`."""
    x, values = as_rows(x, pattern.shape[1]), checked(values).contiguous()
    experts = _Experts(pattern, ends, x, "forward", backend)
    y = x.new_empty(len(x), experts.out_features)
    floats = None if bias is None else bias.to(torch.float32).contiguous()
    dense = experts.run(_native.grouped_forward, array(values), 0 if floats is None else floats.data_ptr(), x, y)
    if dense:
        values = values.to(x.dtype)
        own, alpha = None if bias is None else bias.to(x.dtype), x.new_empty(experts.out_features, x.shape[1])
        for expert, first, last in dense:
            experts.expand(expert, values, alpha)
            if own is None:
                torch.mm(x[first:last], alpha.T, out=y[first:last])
            else:
                torch.addmm(own[expert], x[first:last], alpha.T, out=y[first:last])
    return y


def grad_input(dy: Tensor, ends: Tensor, values: Tensor, pattern: Pattern, backend: str) -> Tensor:
    """dX = dY·αₑ: (rows, out) → (rows, in), in the dtype of `dy`."""
    dy, values = as_rows(dy, pattern.shape[0] // len(ends)), checked(values).contiguous()
    experts = _Experts(pattern, ends, dy, "grad_input", backend)
    dx = dy.new_empty(len(dy), pattern.shape[1])
    dense = experts.run(_native.grouped_grad_input, array(values), dy, dx)
    if dense:
        values = values.to(dy.dtype)
        alpha = dy.new_empty(experts.out_features, pattern.shape[1])
        for expert, first, last in dense:
            experts.expand(expert, values, alpha)
            torch.mm(dy[first:last], alpha, out=dx[first:last])
    return dx


def grad_values(dy: Tensor, x: Tensor, ends: Tensor, pattern: Pattern, backend: str) -> Tensor:
    """dW|B: each expert's dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    dy, x = as_rows(dy, pattern.shape[0] // len(ends)), as_rows(x, pattern.shape[1])
    experts = _Experts(pattern, ends, x, "grad_values", backend)
    gradient = x.new_empty(pattern.stored)
    dense = experts.run(_native.grouped_grad_values, dy, x, gradient)
    if dense:
        dy = dy.to(x.dtype)
        height = min(rows_per_chunk(pattern), experts.out_features)
        chunk = x.new_empty(height, x.shape[1])
        for expert, first, last in dense:
            for row in range(0, experts.out_features, height):
                end = min(row + height, experts.out_features)
                own = torch.mm(dy[first:last, row:end].T, x[first:last], out=chunk[: end - row])
                experts.gather(expert, row, own, gradient)
    return gradient


class _Experts:
    """The experts of a pattern and their rows, as the extension takes them."""

    def __init__(self, pattern: Pattern, ends: Tensor, x: Tensor, product: str, backend: str):
        self._ends = ends.to(torch.int32).contiguous()  # kept: the extension has its address
        self._structure, self.out_features = structure(pattern), pattern.shape[0] // len(ends)
        self._experts = _native.Experts(self._structure, self._ends.data_ptr(), len(ends), len(x))
        self._limits = _limits(product, x.dtype, pattern.block_size, backend)

    def run(self, product, *operands) -> list[tuple[int, int, int]]:
        """The experts that it leaves to dense products: number, first row and end of rows."""
        operands = [array(each) if isinstance(each, Tensor) else each for each in operands]
        return product(cpu.isa, torch.get_num_threads(), self._experts, self._limits, *operands)

    def expand(self, expert: int, values: Tensor, alpha: Tensor):
        """Makes α of an expert, in the dtype of the values."""
        _native.expand(self._part(expert), array(values), array(alpha), thread_count(alpha.numel()))

    def gather(self, expert: int, first: int, dense: Tensor, gradient: Tensor):
        """Reads the dense gradient of some of an expert's rows at B."""
        place = self._part(expert), first, len(dense), array(dense), array(gradient)
        _native.gather(*place, thread_count(dense.numel()))

    def _part(self, expert: int) -> "_native.Pattern":
        return self._structure.part(expert * self.out_features, self.out_features)


def _limits(product: str, dtype: torch.dtype, block_size: tuple[int, int], backend: str) -> "_native.Limits":
    densities, dense = costs.rule(product, dtype, block_size)
    if backend != "auto":
        densities, dense = (1 if backend == "cpu" else -1,) * len(TOKENS), range(0)
    return _native.Limits(TOKENS, densities, dense.start, dense.stop)
