"""Top-KAST: A and B are the largest weights by magnitude (Jayakumar et al. 2020, §2.1 and §2.2)."""

from torch import Tensor

from ..selection import spread_mask, top_mask


def choose(theta: Tensor, size: int, backward_size: int) -> tuple[Tensor, Tensor]:
    """
    A: the `size` largest of `theta` by magnitude. B: the `backward_size` largest. Ties go to the lower flat index.

    Where B needs weights that are exactly zero, as in a model that was pruned before, it takes them evenly from all
    over the layer: by the lower index they would all come from the first rows, and the others could never grow.
    """
    magnitude = theta.abs()
    active = top_mask(magnitude, size)
    nonzero = int(theta.count_nonzero())
    if backward_size <= max(size, nonzero):
        return active, top_mask(magnitude, backward_size)
    backward = active | (theta != 0)
    return active, backward | spread_mask(~backward, backward_size - int(backward.sum()))
