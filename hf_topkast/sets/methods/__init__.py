"""
How A and B are chosen. A method is a function of the weights of one layer, or of one part of a fused layer:

    choose(theta, size, backward_size) -> (active, backward)

with `theta` of shape (out, in) and finite, the sizes of A and B, and two bool masks of that shape, the first inside
the second. Where sets hold whole blocks, `theta` has the blocks' norms in the place of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import topkast


@dataclass(frozen=True)
class Method:
    """
    A rule for A and B.

    Attributes:
        choose (`Callable`): as the module says.
        refreshes (`bool`): whether the sets are chosen again during training.
    """

    choose: Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
    refreshes: bool = True


METHODS: dict[str, Method] = {
    "topkast": Method(topkast.choose),
    "static": Method(topkast.choose, refreshes=False),  # the sets never change: what is zero stays zero
}


def get_method(name: str) -> Method:
    """
    Looks up a method by the configuration's `method`.

    Raises:
        ValueError: if there is no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"method={name!r} is not allowed: it must be one of {sorted(METHODS)}.")
    return METHODS[name]
