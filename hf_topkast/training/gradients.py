"""
Gradients of weights that have none: dYᵀX at places outside B, for methods that grow weights by it. Never whole.

The gradient of a step is a sum over its micro-batches and ranks, so the largest of it can only be told at the end.
Until then each layer keeps its inputs and output gradients; then dYᵀX is made some rows at a time, added up over the
ranks, and of the rows before only the largest so far are kept (RigL, arXiv 1911.11134, appendix C).
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..layers import TopKastLayer
from ..ops import implementation
from ..sets.fused import Rows
from ..sets.selection import block_norms, top_mask
from ..storage import Pattern, full, spread_blocks, world_size


# Share of a layer whose gradient exists at once, or so many numbers where that is more.
CHUNK, MIN_CHUNK_ELEMENTS = 1 / 64, 2**16
# Up to this share of the layer, places are looked up one by one, which costs in proportion to them.
SAMPLED = 1 / 4


class Pass(NamedTuple):
    """
    One pass forward and backward: inputs, (tokens, in), output gradients, (tokens, out), and for a layer of experts
    where the tokens of each begin, with their end.
    """

    x: Tensor
    dy: Tensor
    bounds: list[int] | None

    def counts(self) -> list[int]:
        """How many tokens each expert had."""
        bounds = self.bounds or [0, len(self.x)]
        return [last - first for first, last in pairwise(bounds)]

    def of_row(self, row: int) -> tuple[Tensor, Tensor, int]:
        """Inputs and output gradients of the expert that has a row of the layer, and its first row."""
        if self.bounds is None:
            return self.x, self.dy, 0
        expert = row // self.dy.shape[1]
        tokens = slice(*self.bounds[expert : expert + 2])
        return self.x[tokens], self.dy[tokens], expert * self.dy.shape[1]


class GradientWatch:
    """
    Keeps what the dense gradient of one layer is made of, while it is the layer's `gradient_watch`.

    Args:
        layer ([`TopKastLayer`]): the layer.
        group (`ProcessGroup`, *optional*): the ranks that train the model. `None`: all.
    """

    def __init__(self, layer: TopKastLayer, group: dist.ProcessGroup | None = None):
        self.layer, self.group = layer, group
        self.forget()

    def __getstate__(self):  # a copy has seen nothing, and groups of ranks cannot be copied
        return {**self.__dict__, "_passes": [], "_seen": None, "group": None}

    @torch.compiler.disable
    def __call__(self, x: Tensor, y: Tensor, ends: Tensor | None = None):
        """Notes a pass forward, of experts with where their rows end; the pass backward brings the gradient of `y`."""
        recomputing = torch._C._current_graph_task_id() != -1
        if self._passes and not recomputing and not self.layer.has_gradient():
            self.forget()  # of a step that was skipped, and whose gradients are gone
        if y.requires_grad:
            y.register_hook(partial(self._keep, x.detach(), ends))

    def _keep(self, x: Tensor, ends: Tensor | None, dy: Tensor):
        dy = dy.detach().reshape(-1, dy.shape[-1])
        if bool(dy.isfinite().all()):  # else a gradient scaler will skip the step
            self._passes.append(Pass(x.reshape(-1, x.shape[-1]), dy, None if ends is None else [0, *ends.tolist()]))

    def forget(self):
        """Gives the memory back."""
        self._passes, self._seen = [], None

    def passes(self) -> int:
        """How many passes there were, on all ranks; every rank has to call."""
        count = torch.tensor(len(self._passes), device=self.layer.values.device)
        return int(self._over_ranks(count))

    def seen(self, row: int) -> bool:
        """Whether anything came to the expert that has this row, on any rank; every rank has to call."""
        experts = getattr(self.layer, "experts", 1)
        if self._seen is None:
            counts = torch.zeros(experts, dtype=torch.int64, device=self.layer.values.device)
            for each in self._passes:
                counts += counts.new_tensor(each.counts())
            self._seen = self._over_ranks(counts).tolist()
        return self._seen[row * experts // self.layer.matrix_shape[0]] > 0

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Rows of the dense gradient, all of one expert, summed: (rows, in), float32 or wider."""
        dtype = torch.promote_types(self.layer.values.dtype, torch.float32)
        rows = _with_ends(rows, self.layer.matrix_shape[0])
        count, in_features = _count(rows), self.layer.matrix_shape[1]
        total = torch.zeros(count, in_features, dtype=dtype, device=self.layer.values.device)
        for each in self._passes:
            x, dy, offset = each.of_row(_first(rows))
            # In half precision many would tie, and sums could overflow. Inputs are kept as they came: several layers
            # share one tensor.
            total.addmm_(dy[:, _shifted(rows, -offset)].mT.to(dtype), x.to(dy.dtype).to(dtype))
        return self._over_ranks(total)

    def at(self, pattern: Pattern, first: int = 0) -> Tensor:
        """
        The dense gradient at the places of a pattern of the rows from `first` on, all of one expert, in the order of
        its slots: (stored,), float32 or wider.
        """
        dtype = torch.promote_types(self.layer.values.dtype, torch.float32)
        total = torch.zeros(pattern.stored, dtype=dtype, device=self.layer.values.device)
        for each in self._passes:
            x, dy, offset = each.of_row(first)
            dy = dy[:, first - offset : first - offset + pattern.shape[0]]
            x = x.to(dy.dtype)  # as autocast has it
            total += implementation(self.layer.backend, "grad_values", x, pattern).grad_values(dy, x, pattern)
        return self._over_ranks(total)

    def _over_ranks(self, numbers: Tensor) -> Tensor:
        if world_size(self.group) > 1:
            dist.all_reduce(numbers, group=self.group)
        return numbers


class PartGradients:
    """
    The gradients of a step that a method may ask for, of one part of a layer; see [`Gradients`].

    Args:
        layer ([`TopKastLayer`]): the layer.
        watch ([`GradientWatch`], *optional*): what its dense gradient is made of, for methods that need it.
        rows (`slice` or `torch.Tensor`): the rows of blocks that the part has.
    """

    def __init__(self, layer: TopKastLayer, watch: GradientWatch | None, rows: Rows):
        self._height, self._width = layer.block_size
        self._layer, self._watch = layer, watch
        self._rows = _with_ends(rows, layer.matrix_shape[0] // self._height)

    def largest(self, count: int, among: Tensor) -> Tensor:
        """The places of the `count` largest gradients, or norms of blocks of them; as [`Gradients`] says."""
        mask = torch.zeros_like(among)
        if count > 0:
            few = int(among.sum()) <= SAMPLED * among.numel()
            scores, places = self._one_by_one(among) if few else self._row_by_row(count, among)
            mask.view(-1)[places[top_mask(scores, count)]] = True
        return mask

    def of_active(self) -> Tensor:
        """|g| on A, or its norms in blocks, zero elsewhere; as [`Gradients`] says."""
        layer, pattern, span = self._layer, self._layer.pattern, self._span()
        lines = range(span.start // self._height, span.stop // self._height)
        begin, end = (int(pattern.row_offsets[line]) for line in (lines.start, lines.stop))
        part = pattern.active_part(lines, begin, end)
        dense = torch.zeros(part.numel, dtype=layer.values.dtype, device=layer.values.device)
        if layer.values.grad is not None:
            numbers = self._height * self._width
            dense[part.flat_index()] = full(layer.values.grad)[begin * numbers : end * numbers]
        return self._norms(dense.view(part.shape))[_shifted(self._rows, -lines.start)]

    def seen(self) -> bool:
        """Whether anything came to the rows; as [`Gradients`] says."""
        return self._watch is None or self._watch.seen(self._span().start)

    def _span(self) -> range:
        """The rows of weights from the first of the part to its last."""
        return range(_first(self._rows) * self._height, _end(self._rows) * self._height)

    def _row_by_row(self, count: int, among: Tensor) -> tuple[Tensor, Tensor]:
        """The largest scores and their flat indices, ascending, from some rows of the gradient at a time."""
        columns, in_features = among.shape[1], self._layer.matrix_shape[1]
        chunk = max(MIN_CHUNK_ELEMENTS, int(self._layer.numel * CHUNK))
        step = max(1, chunk // (in_features * self._height))
        best, places = None, torch.empty(0, dtype=torch.int64, device=among.device)
        for first in range(0, len(among), step):
            found = among[first : first + step].flatten().nonzero().squeeze(1)
            scores = self._norms(self._watch.rows(self._weight_rows(first, min(first + step, len(among)))))
            scores = scores.flatten()[found]
            best = scores if best is None else torch.cat([best, scores])
            places = torch.cat([places, found + first * columns])
            if len(best) > count:
                largest = top_mask(best, count)
                best, places = best[largest], places[largest]
        return best, places

    def _one_by_one(self, among: Tensor) -> tuple[Tensor, Tensor]:
        """All scores of the places in `among`, and their flat indices, ascending."""
        span = self._span()
        whole = among.new_zeros(len(span) // self._height, among.shape[1])
        whole[_shifted(self._rows, -(span.start // self._height))] = among
        mask = spread_blocks(whole, (self._height, self._width))
        gradient = self._watch.at(Pattern.from_masks(mask, mask, (self._height, self._width)), span.start)
        if (self._height, self._width) == (1, 1):
            scores = gradient.abs_()
        else:
            scores = gradient.view(-1, self._height * self._width).double().square().sum(1).sqrt()
        return scores, among.flatten().nonzero().squeeze(1)  # rows of a part ascend, so both have one order

    def _norms(self, gradient: Tensor) -> Tensor:
        if (self._height, self._width) == (1, 1):
            return gradient.abs_()
        return block_norms(gradient, (self._height, self._width))

    def _weight_rows(self, first: int, last: int) -> slice | Tensor:
        """The rows of weights of some of the part's rows of blocks."""
        if isinstance(self._rows, slice):
            begin = self._rows.start
            return slice((begin + first) * self._height, (begin + last) * self._height)
        inside = torch.arange(self._height, device=self._rows.device)
        return (self._rows[first:last, None] * self._height + inside).flatten().to(self._layer.values.device)


# Rows as slices with both ends, or as ascending numbers.


def _with_ends(rows: Rows, count: int) -> Rows:
    return slice(*rows.indices(count)[:2]) if isinstance(rows, slice) else rows


def _first(rows: Rows) -> int:
    return rows.start if isinstance(rows, slice) else int(rows[0])


def _end(rows: Rows) -> int:
    return rows.stop if isinstance(rows, slice) else int(rows[-1]) + 1


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _shifted(rows: Rows, by: int) -> Rows:
    return slice(rows.start + by, rows.stop + by) if isinstance(rows, slice) else rows + by
