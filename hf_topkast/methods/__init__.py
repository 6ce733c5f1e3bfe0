"""
How A and B are chosen. A method is a function of one layer's weights:

    choose(theta, density, backward_density) -> (active, backward)

with `theta` of shape (out, in) and finite, and two bool masks of that shape, the first inside the second. Where sets
hold whole blocks, `theta` has the blocks' norms in the place of weights.
"""

from collections.abc import Callable

from torch import Tensor

from ..config import TopKastConfig
from ..selection import block_norms, spread_blocks
from . import topkast


Method = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]

METHODS: dict[str, Method] = {"topkast": topkast.choose}


def get_method(name: str) -> Method:
    """
    Looks up a method by the configuration's `method`.

    Raises:
        ValueError: if there is no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is not allowed: it must be one of {sorted(METHODS)}.")
    return METHODS[name]


def choose_sets(
    config: TopKastConfig, theta: Tensor, density: float, backward_density: float
) -> tuple[Tensor, Tensor]:
    """
    The sets A and B of one layer, by the configuration's method and in blocks of its `block_size`.

    Args:
        config ([`TopKastConfig`]): says how.
        theta (`torch.Tensor`): finite, (out, in).
        density, backward_density (`float`): shares of the layer's weights, or blocks, in A and in B.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: bool, (out, in), the first inside the second.
    """
    choose = get_method(config.method)
    if config.block_size == [1, 1]:
        return choose(theta, density, backward_density)
    sets = choose(block_norms(theta, config.block_size), density, backward_density)
    active, backward = (spread_blocks(mask, config.block_size) for mask in sets)
    return active, backward
