"""The sets that dense layers begin with."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from ..layers import weight_grid
from ..sets import SetPlan
from ..storage import pack_bits, scored


def first_sets(plan: SetPlan, targets: dict[str, nn.Module], norms: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """
    A and B of every layer before it is sparse, chosen one matrix at a time.

    Args:
        plan ([`SetPlan`]): chooses them.
        targets (`dict[str, torch.nn.Module]`): the layers, by name.
        norms (`dict[str, torch.Tensor]`): of their inputs, for those whose weights are scored with them.

    Returns:
        `dict[str, list[torch.Tensor]]`: A and B by layer, a bit for each weight, as [`pack_bits`] gives them.
    """

    @lru_cache(maxsize=1)  # the matrices of a layer are read one after another
    def stacked(name: str) -> Tensor:
        return weight_grid(targets[name], plan.config)

    def weight(name: str, place: int) -> Tensor:
        return stacked(name).chunk(plan.experts[name])[place]

    def scores(name: str, place: int) -> Tensor:
        norm = norms.get(name)
        return scored(weight(name, place), norm[place] if norm is not None and norm.ndim == 2 else norm)

    sizes = plan.sizes(left=1.0, exploring=True, read=weight if plan.config.density == "nonzero" else scores)

    def choose(name: str) -> list[Tensor]:
        places = range(plan.experts[name])
        pairs = [plan.choose(name, scores(name, place), sizes[name], place=place) for place in places]
        return [pack_bits(torch.cat(masks)) for masks in zip(*pairs)]

    return {name: choose(name) for name in targets}
