"""Where each matrix of a layer stands in what the layer stores: those of experts lie one below the other."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import Pattern


class Slots(NamedTuple):
    """
    The places of one matrix in a vector that has the members of A of all matrices first, then those of B\\A.

    Attributes:
        active, exploring (`slice`): its places in A and in B\\A.
    """

    active: slice
    exploring: slice

    @property
    def members(self) -> int:
        """How many are in A."""
        return self.active.stop - self.active.start

    @property
    def together(self) -> slice | None:
        """All of them, unless they lie apart: those of an only matrix do not, nor those without B\\A."""
        if self.exploring.start not in (self.active.stop, self.exploring.stop):
            return None
        return slice(self.active.start, self.active.stop + self.exploring.stop - self.exploring.start)

    def take(self, numbers: Tensor) -> Tensor:
        """What is there, of A first; shares memory where it lies together."""
        if self.together is None:
            return torch.cat([numbers[self.active], numbers[self.exploring]])
        return numbers[self.together]

    def put(self, new: Tensor, numbers: Tensor):
        """Writes to `numbers` what [`Slots.take`] would give."""
        if self.together is not None:
            numbers[self.together] = new
            return
        numbers[self.active] = new[: self.members]
        numbers[self.exploring] = new[self.members :]


class Part(NamedTuple):
    """
    One matrix of a layer in what the layer stores.

    Attributes:
        rows (`range`): its rows of blocks.
        blocks ([`Slots`]): its blocks among those stored.
        numbers ([`Slots`]): its weights among them.
        rest (`slice`): its weights in the reservoir.
    """

    rows: range
    blocks: Slots
    numbers: Slots
    rest: slice


def lay_out(sizes: Sequence[tuple[int, int]], shape: tuple[int, int], block_size: tuple[int, int]) -> list[Part]:
    """
    The parts of a layer whose matrices have sets of these sizes.

    Args:
        sizes (`list[tuple[int, int]]`): |A| and |B| of each matrix, in blocks.
        shape (`tuple[int, int]`): of all matrices, (matrices · out, in).
        block_size (`tuple[int, int]`): (rows, columns) of a block.
    """
    numel, weights = block_size[0] * block_size[1], shape[0] * shape[1] // len(sizes)
    lines = shape[0] // block_size[0] // len(sizes)
    active = _spans(size for size, _ in sizes)
    exploring = _spans((backward - size for size, backward in sizes), active[-1].stop)
    rest = _spans(weights - backward * numel for _, backward in sizes)

    def slots(place: int, each: int) -> Slots:
        spans = active[place], exploring[place]
        return Slots(*(slice(span.start * each, span.stop * each) for span in spans))

    return [
        Part(range(place * lines, (place + 1) * lines), slots(place, 1), slots(place, numel), rest[place])
        for place in range(len(sizes))
    ]


def parts_of(pattern: Pattern, matrices: int) -> list[Part]:
    """The parts of a layer of so many matrices as they are. It waits for a GPU, once."""
    counts = [end - begin for begin, end in pairwise(pattern.cuts(matrices))]
    sizes = [(active, active + exploring) for active, exploring in zip(counts, counts[matrices:])]
    return lay_out(sizes, pattern.shape, pattern.block_size)


def _spans(counts: Iterable[int], begin: int = 0) -> list[slice]:
    return [slice(*ends) for ends in pairwise(accumulate(counts, initial=begin))]
