"""θ of a layer at one step, one matrix at a time."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from .parts import Part, parts_of
from .pattern import Pattern
from .reservoir import assemble_theta


class Matrix(NamedTuple):
    """
    A matrix of a layer, put together: the only one, or that of an expert.

    Attributes:
        place (`int`): which one.
        theta (`torch.Tensor`): θ, (out, in).
        pattern ([`Pattern`]): its sets, as those of a layer by itself.
        input_norms (`torch.Tensor`, *optional*): what its weights are scored with, (in,).
    """

    place: int
    theta: Tensor
    pattern: Pattern
    input_norms: Tensor | None = None

    def scored(self) -> Tensor:
        """What ranks the weights, (out, in): θ, by the norms of its inputs if the layer has them."""
        return scored(self.theta, self.input_norms)


@dataclass(frozen=True)
class Moment:
    """
    θ of a layer as it was at one step, in the parts that it is stored in, whole on this rank.

    Attributes:
        values (`torch.Tensor`): θ on B, (|B|,).
        pattern ([`Pattern`]): where they stand.
        reservoir (`torch.Tensor`): θ outside B, (n − |B|,).
        input_norms (`torch.Tensor`, *optional*): as of [`SparseStorage`].
        matrices (`int`): how many there are.
    """

    values: Tensor
    pattern: Pattern
    reservoir: Tensor
    input_norms: Tensor | None = None
    matrices: int = 1

    @property
    def row_offsets(self) -> Tensor:
        """Those of the pattern."""
        return self.pattern.row_offsets

    def stored(self) -> "Moment":
        """Itself, as what layers are asked for."""
        return self

    @cached_property
    def parts(self) -> list[Part]:
        """Where each matrix stands."""
        return parts_of(self.pattern, self.matrices)

    def pattern_of(self, place: int) -> Pattern:
        """The sets of one matrix."""
        if self.matrices == 1:
            return self.pattern
        part = self.parts[place]
        return self.pattern.part(part.rows, *part.blocks)

    def matrix(self, place: int, rest: Tensor | None = None, theta: Tensor | None = None) -> Matrix:
        """
        One matrix.

        Args:
            place (`int`): which one.
            rest (`torch.Tensor`, *optional*): its part of the reservoir, if that is nearer elsewhere.
            theta (`torch.Tensor`, *optional*): (out, in), in the place of its own θ.
        """
        part, pattern, norms = self.parts[place], self.pattern_of(place), self.input_norms
        if theta is None:
            rest = self.reservoir[part.rest] if rest is None else rest
            theta = assemble_theta(part.numbers.take(self.values), pattern, rest)
        return Matrix(place, theta, pattern, norms if norms is None or norms.ndim == 1 else norms[place])


def scored(theta: Tensor, input_norms: Tensor | None) -> Tensor:
    """
    θ times the norms of its inputs, (out, in), as Wanda scores weights (arXiv 2306.11695); θ without norms. The norms
    are (in,), or (experts, in) where θ holds one expert's matrix below the other.
    """
    if input_norms is None or input_norms.ndim == 1:
        return theta if input_norms is None else theta * input_norms
    return (theta.unflatten(0, (len(input_norms), -1)) * input_norms[:, None]).flatten(0, 1)
