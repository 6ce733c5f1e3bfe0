"""
Gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878): from dense to sparse, and what is pruned stays out.

Settings: their cubic schedule, between a quarter and three quarters of training, near the best of 80 schedules that
arXiv 2501.12486 compares.
"""

from torch import Tensor

from ...method import LayerView, Method
from ..selection import largest_mask


def choose(view: LayerView) -> Tensor:
    """The largest weights of those that are left."""
    scores = view.theta.abs()
    if view.active is not None:
        scores.masked_fill_(~view.active, -1.0)
    return largest_mask(scores, view.size, view.by_row)


METHOD = Method(
    choose,
    keeps_values=False,
    grows=False,
    ranks=True,
    defaults={"initial_density": 1.0, "schedule_begin": 0.25, "schedule_end": 0.75},
    needs="a dense start: all weights, gradients and moments until the schedule begins",
    source="gradual magnitude pruning, [Zhu and Gupta, 2017](https://arxiv.org/abs/1710.01878)",
)
