"""`static` and `static_random`: sets that never change. What is outside B stays as it was."""

import torch
from torch import Tensor

from ...method import LayerView, Method
from ..selection import random_mask
from . import topkast


def choose_random(view: LayerView) -> tuple[Tensor, Tensor]:
    """A and B\\A: drawn uniformly."""
    active = random_mask(torch.ones_like(view.theta, dtype=torch.bool), view.size, view.generator)
    return active, active | random_mask(~active, view.backward_size - view.size, view.generator)


LARGEST = Method(topkast.choose, refreshes=False, explores=True, ranks=True, source="sets that never change")
RANDOM = Method(choose_random, refreshes=False, explores=True, source="random sets that never change")
