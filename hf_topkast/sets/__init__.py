"""
Which weights are in A and B, and when that changes: pure functions of weights, shapes, settings and the step.

`METHODS` (methods/) has the rules by the name that `TopKastConfig.method` gives them.
"""

from ..method import METHODS, get_method
from . import methods  # puts them into the table
from .plan import Present, SetPlan, Sizes
from .schedule import density_window, drop_share_at, next_refresh, resolve_step, way_left
from .selection import check_finite


__all__ = [
    "METHODS",
    "Present",
    "SetPlan",
    "Sizes",
    "check_finite",
    "density_window",
    "drop_share_at",
    "get_method",
    "methods",
    "next_refresh",
    "resolve_step",
    "way_left",
]
