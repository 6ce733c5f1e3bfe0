"""
The masked products of the experts of a block: many matrices of one size in one pattern, one below the other, and rows
of inputs sorted by the expert that they are for.

Everywhere `ends` says which rows are whose: int32, (experts,), the end of each expert's rows. Rows past the last end
are for no expert here, and their products are zero; the gradient of an expert that has no rows is zero. On a CPU the
C++ extension goes over the experts (`grouped_cpu.py`). On a GPU kernels of Triton's multiply all experts at once, for
reading `ends` would wait for it. Else each expert that has rows is multiplied here, by a backend's function of its
own part of the pattern.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..storage import Pattern
from . import composite, has_triton, have_numbers, implementation, load_backend, runs_at_once


try:
    from . import grouped_cpu
except ImportError:  # installed without a compiler
    grouped_cpu = None


def grouped_linear(
    x: Tensor, ends: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, backend: str
) -> Tensor:
    """
    The product of a layer of experts, y = x·αₑᵀ + bₑ for the rows of each expert e; derivatives as of
    [`masked_linear`].

    Args:
        x (`torch.Tensor`): floating point, (rows, in), sorted by expert.
        ends (`torch.Tensor`): int32, (experts,): where the rows of each expert end.
        values (`torch.Tensor`): floating point, (|B|,), in the slot order of `pattern`.
        pattern ([`Pattern`]): where the values stand in the (experts · out, in) matrix.
        bias (`torch.Tensor`, *optional*): (experts, out).
        backend (`str`): as [`select_backend`] allows.

    Returns:
        `torch.Tensor`: (rows, out), in the dtype of `x`, or autocast's where autocast is on.

    Raises:
        ValueError: if the operands do not fit each other, in shape or device.
    """
    _check_operands(x, ends, values, pattern, bias)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values = x.to(dtype), values.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled() and runs_at_once(x) and have_numbers(values, pattern.columns, bias):
        return forward(x, ends, values, pattern, bias, backend)
    if composite.is_needed():
        return _composite_forward(x, ends, values, pattern, bias)
    structure = pattern.row_offsets, pattern.columns
    return _grouped_linear(x, ends, values, *structure, bias, pattern.shape[0], pattern.block_size, backend)


def forward(x: Tensor, ends: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None, backend: str) -> Tensor:
    """y = x·αₑᵀ + bₑ: (rows, in) → (rows, out), in the dtype of `x`."""
    if runs_in_triton(x, backend):
        return load_backend("triton").forward(x, values, pattern, bias, ends)
    if runs_in_extension(backend, x, values):
        return grouped_cpu.forward(x, ends, values, pattern, bias, backend)
    experts = Experts(pattern, ends)
    y = x.new_zeros(len(x), experts.out_features)
    for expert, rows in experts.with_rows():
        part, slots = experts.active(expert)
        own = None if bias is None else bias[expert]
        y[rows] = implementation(backend, "forward", x[rows], part).forward(x[rows], values[slots], part, own)
    return y


def grad_input(dy: Tensor, ends: Tensor, values: Tensor, pattern: Pattern, backend: str) -> Tensor:
    """dX = dY·αₑ: (rows, out) → (rows, in), in the dtype of `dy`."""
    if runs_in_triton(dy, backend):
        return load_backend("triton").grad_input(dy, values, pattern, ends)
    if runs_in_extension(backend, dy, values):
        return grouped_cpu.grad_input(dy, ends, values, pattern, backend)
    experts = Experts(pattern, ends)
    dx = dy.new_zeros(len(dy), pattern.shape[1])
    for expert, rows in experts.with_rows():
        part, slots = experts.active(expert)
        dx[rows] = implementation(backend, "grad_input", dy[rows], part).grad_input(dy[rows], values[slots], part)
    return dx


def grad_values(dy: Tensor, x: Tensor, ends: Tensor, pattern: Pattern, backend: str) -> Tensor:
    """dW|B: each expert's dense-formula gradient dYᵀX read at the slots of B, in the dtype of `x`. → (|B|,)."""
    if runs_in_triton(x, backend):
        return load_backend("triton").grad_values(dy, x, pattern, ends)
    if runs_in_extension(backend, dy, x):
        return grouped_cpu.grad_values(dy, x, ends, pattern, backend)
    experts = Experts(pattern, ends)
    gradient = x.new_zeros(pattern.stored)
    for expert, rows in experts.with_rows():
        part, slots, exploring = experts.stored(expert)
        own = implementation(backend, "grad_values", x[rows], part).grad_values(dy[rows], x[rows], part)
        gradient[slots], gradient[exploring] = own[: part.active], own[part.active :]
    return gradient


def runs_in_triton(x: Tensor, backend: str) -> bool:
    """Whether a product is that of the Triton kernels, which find on the GPU whose rows they have: nothing waits."""
    return backend == "triton" or (backend == "auto" and x.device.type == "cuda" and has_triton())


def runs_in_extension(backend: str, *operands: Tensor) -> bool:
    """Whether the C++ extension does a product of these dense operands and values."""
    return grouped_cpu is not None and grouped_cpu.is_for(backend, *operands)


class Experts:
    """
    The experts of a pattern by number. Reading where their parts begin is all that waits for a GPU.

    Args:
        pattern ([`Pattern`]): of the (experts · out, in) matrix.
        ends (`torch.Tensor`): int32, (experts,): where the rows of each expert end.
    """

    def __init__(self, pattern: Pattern, ends: Tensor):
        self._pattern, self._count = pattern, len(ends)
        self._cuts, self._ends = pattern.cuts(self._count), [0, *ends.tolist()]
        self._block = pattern.block_size[0] * pattern.block_size[1]
        self.out_features = pattern.shape[0] // self._count

    def with_rows(self) -> Iterator[tuple[int, slice]]:
        """The experts that have rows, and which."""
        for expert, (first, last) in enumerate(zip(self._ends, self._ends[1:])):
            if last > first:
                yield expert, slice(first, last)

    def active(self, expert: int) -> tuple[Pattern, slice]:
        """A of an expert, and the slots of its values."""
        blocks = self._blocks(expert)
        return self._pattern.active_part(self._rows(expert), blocks.start, blocks.stop), self._slots(blocks)

    def stored(self, expert: int) -> tuple[Pattern, slice, slice]:
        """B of an expert, and the slots of its values in A and in B\\A."""
        blocks = self._blocks(expert), self._blocks(self._count + expert)
        return self._pattern.part(self._rows(expert), *blocks), *map(self._slots, blocks)

    def _rows(self, expert: int) -> range:
        height = self.out_features // self._pattern.block_size[0]
        return range(expert * height, (expert + 1) * height)

    def _blocks(self, place: int) -> slice:
        return slice(*self._cuts[place : place + 2])

    def _slots(self, blocks: slice) -> slice:
        return slice(blocks.start * self._block, blocks.stop * self._block)


def owners(ends: Tensor, rows: int) -> Tensor:
    """The expert of each row, the number of experts for rows past the last end: int64, (rows,)."""
    places = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, places, right=True)


def _check_operands(x: Tensor, ends: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None):
    """Backends hand over addresses: what does not fit would be read past its end."""
    count = len(ends)
    if x.ndim != 2 or x.shape[1] != pattern.shape[1]:
        raise ValueError(
            f"An input of shape {tuple(x.shape)} does not fit {count} sparse experts of {pattern.shape[1]} inputs: it "
            f"must be (rows, {pattern.shape[1]}), the rows sorted by expert."
        )
    out_features = pattern.shape[0] // count
    if values.shape[0] != pattern.stored or (bias is not None and bias.shape != (count, out_features)):
        raise ValueError(
            f"{values.shape[0]} values{'' if bias is None else f' and a bias of shape {tuple(bias.shape)}'} are not "
            f"those of {count} sparse experts of {out_features} outputs and {pattern.stored} stored weights."
        )
    for name, operand in (("ends", ends), ("values", values), ("columns", pattern.columns), ("bias", bias)):
        if operand is not None and operand.device != x.device:
            raise ValueError(
                f"The input is on {x.device} and the experts' {name} on {operand.device}: move the model, or the "
                "input."
            )


@torch.library.custom_op("hf_topkast::grouped_linear", mutates_args=())
def _grouped_linear(
    x: Tensor,
    ends: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    lines: int,
    block_size: Sequence[int],
    backend: str,
) -> Tensor:
    pattern = Pattern(row_offsets, columns, (lines, x.shape[1]), tuple(block_size))
    y = forward(x, ends, values, pattern, bias, backend)
    # Not as a view of a local tensor: autograd would refuse `y.add_(...)`, which models may do.
    return torch.ops.aten._unsafe_view(y, y.shape)


@_grouped_linear.register_fake
def _(x, ends, values, row_offsets, columns, bias, lines, block_size, backend):
    return x.new_empty(x.shape[0], lines // ends.shape[0])


@torch.library.custom_op("hf_topkast::grouped_grad_input", mutates_args=())
def _grouped_grad_input(
    dy: Tensor,
    ends: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    in_features: int,
    block_size: Sequence[int],
    backend: str,
) -> Tensor:
    pattern = Pattern(row_offsets, columns, (dy.shape[1] * len(ends), in_features), tuple(block_size))
    return grad_input(dy.contiguous(), ends, values, pattern, backend)


@_grouped_grad_input.register_fake
def _(dy, ends, values, row_offsets, columns, in_features, block_size, backend):
    return dy.new_empty(dy.shape[0], in_features)


@torch.library.custom_op("hf_topkast::grouped_grad_values", mutates_args=())
def _grouped_grad_values(
    dy: Tensor,
    x: Tensor,
    ends: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    block_size: Sequence[int],
    backend: str,
) -> Tensor:
    pattern = Pattern(row_offsets, columns, (dy.shape[1] * len(ends), x.shape[1]), tuple(block_size))
    return grad_values(dy.contiguous(), x, ends, pattern, backend)


@_grouped_grad_values.register_fake
def _(dy, x, ends, row_offsets, columns, block_size, backend):
    return x.new_empty(columns.shape[0] * block_size[0] * block_size[1])


def _setup_context(ctx, inputs, output):
    x, ends, values, row_offsets, columns, bias, _, block_size, backend = inputs
    ctx.save_for_backward(x, ends, values, row_offsets, columns)
    ctx.has_bias = bias is not None
    ctx.settings = block_size, backend


def _backward(ctx, dy):
    x, ends, values, *structure = ctx.saved_tensors
    need_x, _, need_values, _, _, need_bias, *_ = ctx.needs_input_grad
    dx = dvalues = dbias = None
    if torch.is_grad_enabled() or composite.is_needed():  # with create_graph: derivatives of these are wanted in turn
        pattern = Pattern(*structure, (dy.shape[1] * len(ends), x.shape[1]), tuple(ctx.settings[0]))
        dx = _composite_grad_input(dy, ends, values, pattern) if need_x else None
        dvalues = _composite_grad_values(dy, x, ends, pattern) if need_values else None
    else:
        dx = _grouped_grad_input(dy, ends, values, *structure, x.shape[1], *ctx.settings) if need_x else None
        dvalues = _grouped_grad_values(dy, x, ends, *structure, *ctx.settings) if need_values else None
    if ctx.has_bias and need_bias:
        rows = dy.new_zeros(len(ends) + 1, dy.shape[1])
        dbias = rows.index_add(0, owners(ends, len(dy)), dy)[:-1]
    return dx, None, dvalues, None, None, dbias, None, None, None


torch.library.register_autograd("hf_topkast::grouped_linear", _backward, setup_context=_setup_context)


# By dense operations, every row with every expert: differentiable any number of times, in either mode, and batched.


def _composite_forward(x: Tensor, ends: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    products = x.new_zeros(len(x), pattern.shape[0] // len(ends))
    for expert, (own, alpha) in enumerate(zip(*_masks_and_alpha(x, ends, values, pattern))):
        offset = 0 if bias is None else bias[expert].to(x.dtype)
        products = products + own * (x @ alpha.mT + offset)
    return products


def _composite_grad_input(dy: Tensor, ends: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    return sum(own * (dy @ alpha) for own, alpha in zip(*_masks_and_alpha(dy, ends, values, pattern)))


def _composite_grad_values(dy: Tensor, x: Tensor, ends: Tensor, pattern: Pattern) -> Tensor:
    owner = owners(ends, len(x))
    dense = [(dy * (owner == expert)[:, None]).mT.to(x.dtype) @ x for expert in range(len(ends))]
    return torch.stack(dense).flatten()[pattern.flat_index()]


def _masks_and_alpha(x: Tensor, ends: Tensor, values: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Which rows each expert has, (experts, rows, 1), as numbers, and its α, (experts, out, in)."""
    experts = torch.arange(len(ends), device=ends.device)
    masks = (owners(ends, len(x)) == experts[:, None])[..., None].to(x.dtype)
    return masks, composite.expand_active(values.to(x.dtype), pattern).unflatten(0, (len(ends), -1))
