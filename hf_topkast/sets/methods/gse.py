"""
GSE, always sparse training by growing connections with guided stochastic exploration (Heddes et al. 2024, arXiv
2401.06898): looks at the gradients of a random sample of the inactive weights only, so its cost is linear in |A|.

Settings: theirs, a sample as large as A, uniform; 20% of A every 1,000 steps by a cosine.
"""

import torch
from torch import Tensor

from ...method import LayerView, Method
from ..selection import random_mask
from .exchange import exchanged, keep_largest, random_start


# Draws over the size of A, their γ.
SAMPLE = 1.0


def choose(view: LayerView) -> Tensor:
    """
    Grows the places with the largest gradients in a sample, drawn with replacement from outside A, then drops the
    smallest of those that A had before; new weights are zero.
    """
    if view.active is None:
        return random_start(view)
    outside = (~view.active).flatten().nonzero().squeeze(1)
    count = min(exchanged(view) + max(0, view.size - int(view.active.count_nonzero())), outside.numel())
    grown = torch.zeros_like(view.active)
    if count:
        draws = torch.randint(outside.numel(), (round(SAMPLE * view.size),), generator=view.generator)
        sample = torch.zeros_like(view.active)
        sample.view(-1)[outside[draws.to(outside.device)]] = True
        grown = view.gradients.largest(min(count, int(sample.count_nonzero())), sample)
    new = int(grown.count_nonzero())
    stay = keep_largest(view.active, view.theta.abs(), min(view.size - new, int(view.active.count_nonzero())))
    missing = view.size - int(stay.count_nonzero()) - new  # of an A that grows by more than the sample has
    return stay | grown | random_mask(~(view.active | grown), missing, view.generator)


METHOD = Method(
    choose,
    keeps_values=False,
    gradient="dense",
    defaults={
        "refresh_every": 1000,
        "drop_share": 0.2,
        "drop_end": 0.0,
        "drop_decay": "cosine",
        "update_until": 1.0,
    },
    needs="inputs and output gradients of every sparse layer, for the steps that end in a refresh",
    source="GSE, [Heddes et al., 2024](https://arxiv.org/abs/2401.06898)",
)
