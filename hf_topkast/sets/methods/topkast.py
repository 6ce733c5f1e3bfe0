"""Top-KAST: A and B are the largest weights by magnitude (Jayakumar et al. 2020, §2.1 and §2.2)."""

from torch import Tensor

from ..selection import spread_mask, top_mask


def choose(theta: Tensor, size: int, backward_size: int) -> tuple[Tensor, Tensor]:
    """A: the `size` largest of `theta` by magnitude. B: the `backward_size` largest. Ties go to the lower index."""
    magnitude = theta.abs()
    return top_mask(magnitude, size), top_mask(magnitude, backward_size)


def choose_of_pruned(theta: Tensor, size: int, backward_size: int) -> tuple[Tensor, Tensor]:
    """
    The same for a model that was pruned before, except for the weights of B that are exactly zero: they come evenly
    from all over the layer. By the lower index they would all be in the first rows, and the others could never grow.
    """
    active, backward = choose(theta, size, backward_size)
    if backward_size <= max(size, int(theta.count_nonzero())):
        return active, backward
    backward = active | (theta != 0)
    return active, backward | spread_mask(~backward, backward_size - int(backward.sum()))
