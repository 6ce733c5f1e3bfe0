"""
Gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878): from dense to sparse, and what is pruned stays out.

Settings: their cubic schedule, between a quarter and three quarters of training, near the best of 80 schedules that
arXiv 2501.12486 compares.
"""

from torch import Tensor

from ...method import LayerView, Method
from ..selection import top_mask
from .exchange import keep_largest


def choose(view: LayerView) -> Tensor:
    """The largest weights of those that are left."""
    if view.active is None:
        return top_mask(view.theta.abs(), view.size)
    return keep_largest(view.active, view.theta.abs(), min(view.size, int(view.active.sum())))


METHOD = Method(
    choose,
    keeps_values=False,
    grows=False,
    defaults={"initial_density": 1.0, "schedule_begin": 0.25, "schedule_end": 0.75},
    needs="a dense start: all weights, gradients and moments until the schedule begins",
)
