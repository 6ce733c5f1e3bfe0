"""
How A and B are chosen. A method is a function of one layer's weights:

    choose(theta, density, backward_density) -> (active, backward)

with `theta` of shape (out, in) and finite, and two bool masks of that shape, the first inside the second.
"""

from collections.abc import Callable

from torch import Tensor

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
