"""
RigL (Evci et al. 2020, arXiv 1911.11134): drops small weights, grows where the dense gradient is largest.

The dense gradient is never whole: it is made some rows at a time, with a running choice of the largest (their appendix
C), from the inputs and output gradients that a step ending in a refresh keeps. Settings: theirs.
"""

from torch import Tensor

from ...method import LayerView, Method
from .exchange import kept, random_start
from .set_ import DEFAULTS


def choose(view: LayerView) -> Tensor:
    """
    A without its smallest weights, and the places outside of what stays with the largest gradients; new weights are
    zero. One that is dropped and grown at once keeps its value.
    """
    if view.active is None:
        return random_start(view)
    stay = kept(view, view.theta.abs())
    return stay | view.gradients.largest(view.size - int(stay.count_nonzero()), ~stay)


METHOD = Method(
    choose,
    keeps_values=False,
    gradient="dense",
    defaults=DEFAULTS,
    needs="inputs and output gradients of every sparse layer, for the steps that end in a refresh",
    source="RigL, [Evci et al., 2020](https://arxiv.org/abs/1911.11134)",
)
