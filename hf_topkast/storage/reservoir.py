"""
Where the weights outside B rest: beside the layer, in host memory, or on disk.

They are stored once, as n − |B| numbers in ascending flat order, and only a refresh touches them. That is what lets an
accelerator hold the sparse numbers alone (the paper's §2.4 proposes it). Under a method whose new weights begin at
zero there are none: everything outside B is zero (`NOWHERE`).
"""

import functools
import os
import tempfile

import torch
from torch import Tensor

from ..native import accelerated_by
from . import passes
from .distributed import is_sharded, local
from .pattern import Pattern


# The place of weights that are not stored.
NOWHERE = "nowhere"


def take_reservoir(theta: Tensor, backward: Tensor, place: str) -> Tensor:
    """
    The weights outside B, n − |B| numbers, or none where their place is `NOWHERE`; `theta` and the bool mask
    `backward` have one shape.
    """
    return theta.new_empty(0) if place == NOWHERE else outside(theta, backward)


@accelerated_by(passes.outside)
def outside(numbers: Tensor, mask: Tensor) -> Tensor:
    """The numbers that are not marked in the bool mask of their shape, in their order, flat."""
    # In two steps, which take half the time of numbers[~mask].
    return numbers.flatten().index_select(0, (~mask).flatten().nonzero().squeeze(1))


@accelerated_by(passes.assemble_theta)
def assemble_theta(values: Tensor, pattern: Pattern, reservoir: Tensor) -> Tensor:
    """
    θ, the full weight, from what a layer stores: (out, in), in the dtype and on the device of `values`; zero outside B
    without a reservoir.
    """
    if reservoir.numel():
        theta = torch.empty(pattern.shape, dtype=values.dtype, device=values.device)
        theta.masked_scatter_(~pattern.backward_mask(), reservoir.to(values.device))
    else:
        theta = torch.zeros(pattern.shape, dtype=values.dtype, device=values.device)
    theta.view(-1)[pattern.flat_index()] = values
    return theta


def put_to_rest(numbers: Tensor, place: str) -> Tensor:
    """
    Copies a reservoir to where it rests away from the layer.

    Args:
        numbers (`torch.Tensor`): (n − |B|,), on any device; of a sharded one each rank puts its part to rest.
        place (`str`): `"cpu"` for host memory, pinned where there is a GPU; `"disk"` for a memory-mapped file in the
            system's directory for temporary files (`TMPDIR` chooses another), which the operating system removes when
            the tensor or the process ends.

    Returns:
        `torch.Tensor`: on the CPU, equal to `numbers`.

    Raises:
        OSError: if the disk has no room.
    """
    if is_sharded(numbers):
        numbers = numbers.to("cpu")
        numbers._local_tensor = put_to_rest(local(numbers), place)  # as FSDP2 itself offloads
        return numbers
    return make_room(numbers, len(numbers), place).copy_(numbers)


def make_room(like: Tensor, count: int, place: str) -> Tensor:
    """
    Memory for a reservoir of so many numbers of the dtype of `like`, (count,): `"same"`, on its device; others as of
    [`put_to_rest`].
    """
    if place == "same":
        return like.new_empty(count)
    if place == "disk" and count:
        with tempfile.NamedTemporaryFile(prefix="topkast_reservoir_") as file:  # the mapping outlives the name
            _reserve(file, count * like.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=like.dtype)
    return torch.empty(count, dtype=like.dtype, device="cpu", pin_memory=torch.cuda.is_available())


class Arriving:
    """
    A reservoir on its way from the host to a GPU, beside whatever the GPU does; any other is where it is needed.

    Args:
        resting (`torch.Tensor`, *optional*): numbers as [`put_to_rest`] gives them, which must not change before they
            are here. `None`: nothing is on its way.
        device (`torch.device`): where it is needed.
    """

    def __init__(self, resting: Tensor | None, device: torch.device):
        self._numbers, self._arrival = resting, None
        if device.type == "cuda" and resting is not None and resting.device.type == "cpu":
            stream = _copying_stream(device)
            with torch.cuda.stream(stream):
                self._numbers = resting.to(device, non_blocking=True)
            self._arrival = stream.record_event()

    def here(self) -> Tensor | None:
        """The numbers, for what the present stream does next."""
        if self._arrival is not None:
            present = torch.cuda.current_stream(self._numbers.device)
            present.wait_event(self._arrival)
            self._numbers.record_stream(present)  # else their memory could be given away before it is read
        return self._numbers


@functools.cache
def _copying_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def _reserve(file, size: int):
    """Takes the disk space now: a mapped file that finds the disk full at a write ends the process without a word."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"There is no room for a reservoir of {size} bytes in {os.path.dirname(file.name)} ({error.strerror}): "
            "set the environment variable TMPDIR to a larger disk, or use reservoir_device='cpu'",
        ) from error
