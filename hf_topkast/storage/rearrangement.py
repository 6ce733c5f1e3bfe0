"""What a layer stores under one pair of sets, made into what it stores under another."""

from torch import Tensor

from ..native import accelerated_by
from . import passes
from .pattern import Pattern, slot_sources, take_slots
from .reservoir import outside


@accelerated_by(passes.rearrange)
def rearrange(
    theta: Tensor,
    backward: Tensor,
    former: Pattern,
    pattern: Pattern,
    keeps_rest: bool,
    into: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """
    What a layer stores of θ once it has other sets.

    Args:
        theta (`torch.Tensor`): (out, in).
        backward (`torch.Tensor`): the new B as a bool mask, (out, in).
        former, pattern ([`Pattern`]): the sets there were and the new ones, in the same blocks.
        keeps_rest (`bool`): whether there is a reservoir.
        into (`tuple[torch.Tensor, torch.Tensor]`, *optional*): memory for values and reservoir, written and returned
            where it fits and nothing else would copy them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the former slot of each slot, -1 for a weight that enters B,
        int32 (int64 past 2³¹ slots), (|B|,); the values, (|B|,); the reservoir, (n − |B|,), or empty where there is
        none.
    """
    reservoir = outside(theta, backward) if keeps_rest else theta.new_empty(0)
    return slot_sources(former, pattern), take_slots(theta, pattern), reservoir


@accelerated_by(passes.count_from)
def count_from(sources: Tensor, former: int) -> int:
    """How many slots come from one of the first `former` slots, of sources as of [`rearrange`]."""
    return int(((sources >= 0) & (sources < former)).count_nonzero())
