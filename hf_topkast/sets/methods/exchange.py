"""What methods share that drop a share of A and grow as many weights elsewhere."""

import torch
from torch import Tensor

from ...method import LayerView
from ..selection import random_mask, top_mask


def random_start(view: LayerView) -> Tensor:
    """The first A: drawn uniformly, as SET and RigL start."""
    return random_mask(torch.ones_like(view.theta, dtype=torch.bool), view.size, view.generator)


def exchanged(view: LayerView) -> int:
    """How many weights to exchange: the present share of A."""
    return round(view.drop * min(view.size, int(view.active.count_nonzero())))


def kept(view: LayerView, scores: Tensor) -> Tensor:
    """A without the lowest scores, as many as are exchanged; `scores` is (rows, columns), at least 0."""
    count = min(view.size, int(view.active.count_nonzero())) - exchanged(view)
    return keep_largest(view.active, scores, count)


def keep_largest(active: Tensor, scores: Tensor, count: int) -> Tensor:
    """The `count` members of A with the largest scores; ties go to the lower index."""
    return top_mask(torch.where(active, scores, -1.0), count)


def grow_at_random(view: LayerView, stay: Tensor) -> Tensor:
    """`stay` and so many others, drawn uniformly, that A is full; what was dropped just now may come back."""
    return stay | random_mask(~stay, view.size - int(stay.count_nonzero()), view.generator)
