"""
Which weights are in A and B, and when that changes: pure functions of weights, shapes, settings and the step.

`METHODS` (methods/) has the rules by the name that `TopKastConfig.method` gives them.
"""

from ..method import METHODS, get_method
from . import methods  # puts them into the table
from .plan import Present, SetPlan, Sizes
from .selection import check_finite
from .timetable import Timetable


__all__ = [
    "METHODS",
    "Present",
    "SetPlan",
    "Sizes",
    "Timetable",
    "check_finite",
    "get_method",
    "methods",
]
