"""
DPF, dynamic pruning with feedback (Lin et al. 2020, arXiv 2006.07253): the forward pass uses the largest weights, the
step goes to all of them. It is Top-KAST with everything in B, without a penalty.

Settings: theirs, sets every 16 steps, from dense by a cubic schedule, here in the first half of training.
"""

import math

from ...method import Method
from . import topkast


METHOD = Method(
    topkast.choose,
    explores=True,
    ranks=True,
    backward_ratio=math.inf,
    defaults={"refresh_every": 16, "penalty": 0.0, "initial_density": 1.0},
    needs="values, gradients and moments of all weights: B is everything",
    source="DPF, [Lin et al., 2020](https://arxiv.org/abs/2006.07253)",
)
