"""
Where the weights outside B rest: beside the layer, in host memory, or on disk.

They are stored once, as n − |B| numbers in ascending flat order, and only a refresh touches them. That is what lets an
accelerator hold the sparse numbers alone (the paper's §2.4 proposes it).
"""

import tempfile

import torch
from torch import Tensor

from .pattern import Pattern


def take_reservoir(theta: Tensor, backward: Tensor) -> Tensor:
    """The weights outside B, n − |B| numbers; `theta` and the bool mask `backward` have one shape."""
    # In two steps, which take half the time of theta[~backward].
    return theta.flatten().index_select(0, (~backward).flatten().nonzero().squeeze(1))


def assemble_theta(values: Tensor, pattern: Pattern, reservoir: Tensor) -> Tensor:
    """θ, the full weight, from what a layer stores: (out, in), in the dtype and on the device of `values`."""
    theta = torch.empty(pattern.shape, dtype=values.dtype, device=values.device)
    theta.masked_scatter_(~pattern.backward_mask(), reservoir.to(values.device))
    theta.view(-1)[pattern.flat_index()] = values
    return theta


def put_to_rest(numbers: Tensor, place: str) -> Tensor:
    """
    Copies a reservoir to where it rests away from the layer.

    Args:
        numbers (`torch.Tensor`): (n − |B|,), on any device.
        place (`str`): `"cpu"` for host memory, pinned where there is a GPU; `"disk"` for a memory-mapped file in the
            system's directory for temporary files (`TMPDIR` chooses another), which the operating system removes when
            the tensor or the process ends.

    Returns:
        `torch.Tensor`: on the CPU, equal to `numbers`.
    """
    if place == "disk" and numbers.numel():
        with tempfile.NamedTemporaryFile(prefix="topkast_reservoir_") as file:  # the mapping outlives the name
            resting = torch.from_file(file.name, shared=True, size=numbers.numel(), dtype=numbers.dtype)
    else:
        resting = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=torch.cuda.is_available())
    return resting.copy_(numbers)
