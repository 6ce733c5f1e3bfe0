"""Top-KAST: A and B are the largest weights by magnitude (Jayakumar et al. 2020, §2.1 and §2.2)."""

from torch import Tensor

from ...method import LayerView, Method
from ..selection import largest_masks, spread_mask


def choose(view: LayerView) -> tuple[Tensor, Tensor]:
    """
    A: the `size` largest weights by score. B: the `backward_size` largest. Ties go to the lower index.

    Except in a model that was pruned before, for the weights of B that are exactly zero: they come evenly from all
    over the layer. By the lower index they would all be in the first rows, and the others could never grow.
    """
    active, backward = largest_masks(view.theta, (view.size, view.backward_size), view.by_row, magnitudes=True)
    if not view.pruned or view.backward_size <= max(view.size, int(view.theta.count_nonzero())):
        return active, backward
    backward = active | (view.theta != 0)
    return active, backward | spread_mask(~backward, view.backward_size - int(backward.sum()))


METHOD = Method(
    choose,
    explores=True,
    backward_ratio=2.0,
    ranks=True,
    source="Top-KAST, [Jayakumar et al., 2020](https://arxiv.org/abs/2106.03517)",
)
