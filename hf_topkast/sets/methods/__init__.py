"""
The methods, one file each: how A and B are chosen, and what a weight that enters B begins with. What a method is says
`hf_topkast.method`; `docs/methods.md` compares them.
"""

from ...method import METHODS
from . import (
    dpf,
    gse,
    magnitude_pruning,
    mest,
    random_exploration,
    rigl,
    set_,
    smet,
    static,
    topkast,
)


METHODS.update(
    topkast=topkast.METHOD,
    topkast_random=random_exploration.METHOD,
    static=static.LARGEST,
    static_random=static.RANDOM,
    set=set_.METHOD,
    rigl=rigl.METHOD,
    gse=gse.METHOD,
    mest=mest.METHOD,
    smet=smet.METHOD,
    magnitude_pruning=magnitude_pruning.METHOD,
    dpf=dpf.METHOD,
)
