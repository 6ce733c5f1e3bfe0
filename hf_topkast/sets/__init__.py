"""
Which weights are in A and B, and when that changes: pure functions of weights, shapes, settings and the step.

`METHODS` (methods/) has the rules by the name that `TopKastConfig.method` gives them.
"""

from .methods import METHODS, get_method
from .plan import SetPlan, Sizes
from .schedule import density_window, next_refresh, resolve_step, way_left
from .selection import check_finite


__all__ = [
    "METHODS",
    "SetPlan",
    "Sizes",
    "check_finite",
    "density_window",
    "get_method",
    "next_refresh",
    "resolve_step",
    "way_left",
]
