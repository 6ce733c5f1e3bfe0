"""`topkast_random`: Top-KAST with B\\A at random for the next largest, an ablation of Jayakumar et al. 2020."""

from torch import Tensor

from ...method import LayerView, Method
from ..selection import largest_masks, random_mask


def choose(view: LayerView) -> tuple[Tensor, Tensor]:
    """A: the largest weights by magnitude. B\\A: drawn uniformly from all others, anew at each refresh."""
    (active,) = largest_masks(view.theta, (view.size,), view.by_row, magnitudes=True)
    return active, active | random_mask(~active, view.backward_size - view.size, view.generator)


METHOD = Method(
    choose,
    explores=True,
    backward_ratio=2.0,
    ranks=True,
    source="Top-KAST with random exploration, [Jayakumar et al., 2020](https://arxiv.org/abs/2106.03517)",
)
