"""
MEST (Yuan et al. 2021, arXiv 2110.14032): drops by weight and gradient of A, grows at random.

Settings: theirs with the fixed memory bound, 2% of all weights at a time, 1% from 56% of training on, none after 75%.
They count the updates in epochs; here there is one every 100 steps.
"""

from torch import Tensor

from ...config import TopKastConfig
from ...method import LayerView, Method
from .exchange import grow_at_random, kept, random_start


# Weight of the gradient beside that of the weight.
GRADIENT = 0.01


def choose(view: LayerView) -> Tensor:
    """A without the lowest |θ| + 0.01·|g|, and as many others at random; new weights are zero."""
    if view.active is None:
        return random_start(view)
    return grow_at_random(view, kept(view, view.theta.abs() + GRADIENT * view.gradients.of_active()))


def _drop_share(config: TopKastConfig) -> float:
    """2% of all weights as a share of A, at most half of it."""
    return 0.1 if config.density == "nonzero" else min(0.5, 0.02 / config.density)


METHOD = Method(
    choose,
    keeps_values=False,
    gradient="active",
    defaults={"drop_share": _drop_share, "drop_end": 0.0, "drop_decay": "staged", "update_until": 0.75},
    source="MEST, [Yuan et al., 2021](https://arxiv.org/abs/2110.14032)",
)
