"""
SET, sparse evolutionary training (Mocanu et al. 2018, arXiv 1707.04780): drops small weights, grows at random.

Settings: 30% of A every 100 steps, by a cosine to nothing at 75% of training, as in RigL's comparison (arXiv
1911.11134).
"""

from torch import Tensor

from ...method import LayerView, Method
from .exchange import grow_at_random, kept, random_start


def choose(view: LayerView) -> Tensor:
    """A without its smallest weights, and as many others at random; new weights are zero."""
    if view.active is None:
        return random_start(view)
    return grow_at_random(view, kept(view, view.theta.abs()))


DEFAULTS = {"drop_share": 0.3, "drop_end": 0.0, "drop_decay": "cosine", "update_until": 0.75}
METHOD = Method(
    choose,
    keeps_values=False,
    defaults=DEFAULTS,
    source="SET, [Mocanu et al., 2018](https://arxiv.org/abs/1707.04780)",
)
