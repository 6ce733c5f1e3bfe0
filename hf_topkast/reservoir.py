"""Where the weights outside B rest. So far: beside the layer, each stored once, in ascending flat order."""

import torch
from torch import Tensor

from .pattern import Pattern


def take_reservoir(theta: Tensor, backward: Tensor) -> Tensor:
    """The weights outside B, n − |B| numbers; `theta` and the bool mask `backward` have one shape."""
    return theta[~backward]


def assemble_theta(values: Tensor, pattern: Pattern, reservoir: Tensor) -> Tensor:
    """θ, the full weight, from what a layer stores: (out, in), in the dtype of `values`."""
    theta = torch.empty(pattern.shape, dtype=values.dtype, device=values.device)
    theta.masked_scatter_(~pattern.backward_mask(), reservoir)
    theta.view(-1)[pattern.flat_index()] = values
    return theta
