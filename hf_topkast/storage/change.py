"""From one pair of sets to another, one matrix of a layer at a time: no more than that is ever put together."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .distributed import carry, full, is_sharded, local, part_of, place_here, shard_like
from .moment import Matrix
from .parts import Part, lay_out
from .pattern import Pattern, pack_part
from .rearrangement import count_from, rearrange
from .reservoir import NOWHERE, make_room
from .state_dict import STRUCTURE


if TYPE_CHECKING:
    from .store import SparseStorage

# What a vector starts with where weights enter B: of (sources, values) of one matrix, as of [`rearrange`], a scalar or
# a number for each slot.
Start = Callable[[Tensor, Tensor], Tensor]


class Change:
    """
    Gives the matrices of a layer other sets, one after another; every weight keeps its number.

    What is stored changes in place, unless a matrix of the layer gets sets of other sizes: then all of it is written
    to new memory, which takes the place of the former at the end. Of what FSDP2 has sharded every rank holds the whole
    meanwhile. After an error inside the `with` block, matrices that were given other sets in place keep them.

    Args:
        layer ([`SparseStorage`]): the layer; with FSDP2 every rank has to call.
        sizes (`list[tuple[int, int]]`): |A| and |B| that each matrix will have, in blocks.

    Attributes:
        former ([`Moment`]): the layer before.
    """

    def __init__(self, layer: "SparseStorage", sizes: Sequence[tuple[int, int]]):
        self.layer, self.former = layer, layer.stored()
        self.parts = lay_out(sizes, layer.matrix_shape, layer.block_size)
        self.in_place = self.parts == self.former.parts
        self._values, self._rest, pattern = self.former.values, self.former.reservoir, self.former.pattern
        if not self.in_place:
            last = self.parts[-1]
            blocks = last.blocks.exploring.stop
            self._values = self._values.new_empty(last.numbers.exploring.stop)
            row_offsets = torch.full_like(pattern.row_offsets, blocks)
            pattern = pattern._replace(row_offsets=row_offsets, columns=pattern.columns.new_empty(blocks))
            if layer.reservoir_device != NOWHERE:
                place = "same" if is_sharded(layer.reservoir) else layer.reservoir_device
                self._rest = make_room(self._rest, last.rest.stop, place)
        self._pattern = pattern._replace(column_walk=None)
        self._carried: list[_Carried] = []
        self._begun = self._torn = False
        if layer.values.grad is not None:
            self.carry(layer.values.grad, lambda sources, values: values.new_zeros(()), self._keep_gradient)

    def __enter__(self) -> "Change":
        return self

    def __exit__(self, kind, *error):
        if kind is None or (self.in_place and self._begun and not self._torn):
            self._finish()

    def carry(self, numbers: Tensor, start: Start, keep: Callable[[Tensor], None]):
        """
        Has another vector move along.

        Args:
            numbers (`torch.Tensor`): a number a slot, (|B|,), sharded or not; changed in place if it keeps its size.
            start (`Callable`): gives what it has for weights that enter B.
            keep (`Callable`): takes the vector that replaces it, if it does not.
        """
        self._carried.append(_Carried(numbers, start, keep, self._values.numel(), self.in_place))

    def give(self, matrix: Matrix, active: Tensor, backward: Tensor) -> int:
        """
        Gives one matrix other sets.

        Args:
            matrix ([`Matrix`]): as `former` has it.
            active, backward (`torch.Tensor`): A and B as bool masks, (out, in), of the sizes that were said.

        Returns:
            `int`: how many members of A left it.
        """
        layer, part, before = self.layer, self.parts[matrix.place], self.former.parts[matrix.place]
        pattern = Pattern.from_masks(active, backward, layer.block_size)
        if self.in_place:
            self._begin()
        self._torn = True
        together = part.numbers.together
        into = self._values[:0] if together is None else self._values[together], self._rest[part.rest]
        keeps_rest = layer.reservoir_device != NOWHERE
        sources, values, rest = rearrange(matrix.theta, backward, matrix.pattern, pattern, keeps_rest, into=into)
        for each in self._carried:
            each.move(before, part, sources, values)
        if values is not into[0]:
            part.numbers.put(values, self._values)
        if rest is not into[1]:
            into[1].copy_(rest)
        self._put_structure(part, pattern)
        self._visit(active, matrix.place * active.numel())
        if self.in_place:
            layer._watch()  # its sets and values belong together again
        self._torn = False
        return before.numbers.members - count_from(sources[: part.numbers.members], before.numbers.members)

    def _begin(self):
        """From here on who reads the layer reads two states."""
        if not self._begun:
            self.layer.assignments += 2 if self.layer.assignments % 2 else 1  # odd, also after a change that failed
            self._begun = True

    def _put_structure(self, part: Part, pattern: Pattern):
        """Writes the sets of a matrix to where [`Pattern.part`] takes them from."""
        part.blocks.put(pattern.columns, self._pattern.columns)
        lines, below = len(part.rows), len(self._pattern.row_offsets) // 2
        active, exploring = pattern.row_offsets[:-1].view(2, lines)
        whole, rows = self._pattern.row_offsets, part.rows
        whole[rows.start : rows.stop] = active + part.blocks.active.start
        whole[below + rows.start : below + rows.stop] = exploring + part.blocks.exploring.start - part.blocks.members

    def _visit(self, active: Tensor, begin: int):
        """Members of A, of the weights from `begin` on, are no longer unvisited."""
        first, visited = pack_part(active, begin)
        held, offset = local(self.layer.unvisited), place_here(self.layer.unvisited)
        low, high = max(first, offset), min(first + len(visited), offset + len(held))
        if low < high:
            held[low - offset : high - offset].bitwise_and_(~visited[low - first : high - first])

    def _finish(self):
        layer, pattern = self.layer, self._pattern
        self._begin()
        if layer.values.shape != self._values.shape:
            layer.values.grad = None  # of another size, which torch would refuse
        layer._write("values", self._values)
        for name in STRUCTURE:
            layer._write(name, getattr(pattern, name))
        if pattern.fills_tiles:
            layer._keep_walk(pattern.walk_by_columns())
        if layer._rests_elsewhere and not is_sharded(layer.reservoir):
            layer.reservoir = self._rest
        else:
            layer._write("reservoir", self._rest)
        for each in self._carried:
            each.finish()
        layer._note_digest(pattern)
        layer.assignments += 1

    def _keep_gradient(self, gradient: Tensor):
        self.layer.values.grad = gradient


class _Carried:
    """A vector with a number a slot on its way with the weights, see [`Change.carry`]."""

    def __init__(self, numbers: Tensor, start: Start, keep: Callable[[Tensor], None], size: int, in_place: bool):
        self._numbers, self._start, self._keep, self._in_place = numbers, start, keep, in_place
        self._former = full(numbers.detach())
        self._now = self._former if in_place else self._former.new_empty(size)

    def move(self, before: Part, part: Part, sources: Tensor, values: Tensor):
        start = self._start(sources, values).to(self._now.device, self._now.dtype)
        part.numbers.put(carry(before.numbers.take(self._former), sources, start), self._now)

    def finish(self):
        if self._numbers.shape != self._now.shape:
            self._keep(shard_like(self._now, self._numbers) if is_sharded(self._numbers) else self._now)
        elif is_sharded(self._numbers) or not self._in_place:  # else it is there
            local(self._numbers).copy_(part_of(self._now, self._numbers))
