"""Top-KAST: A and B are the largest weights by magnitude (Jayakumar et al. 2020, §2.1 and §2.2)."""

from torch import Tensor

from ..selection import set_size, top_mask


def choose(theta: Tensor, density: float, backward_density: float) -> tuple[Tensor, Tensor]:
    """A: the top `density` of `theta` by magnitude. B: the top `backward_density`. Ties go to the lower flat index."""
    magnitude = theta.abs()
    size = set_size(theta.numel(), density)
    backward_size = max(size, set_size(theta.numel(), backward_density))
    return top_mask(magnitude, size), top_mask(magnitude, backward_size)
