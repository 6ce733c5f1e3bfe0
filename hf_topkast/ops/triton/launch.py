"""What the kernels share: operands as matrices on a device that Triton reaches, and whether it is interpreted."""

import contextlib

import torch
import triton
from torch import Tensor


# Read when the kernels are compiled, so it cannot change afterwards.
INTERPRETED: bool = triton.knobs.runtime.interpret


def as_rows(tensor: Tensor, features: int) -> Tensor:
    """
    (..., features) as a contiguous (tokens, features).

    Raises:
        ValueError: if the last dimension is another one, or the tensor is not on a GPU and Triton is not interpreted.
    """
    if tensor.shape[-1] != features:
        raise ValueError(f"The last dimension of {tuple(tensor.shape)} is not the layer's {features}.")
    if tensor.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"backend='triton' multiplies tensors on a GPU, and got one on {tensor.device}. Move the model with "
            ".to('cuda'), or use backend='auto', which chooses by device."
        )
    return tensor.reshape(tensor.numel() // features, features).contiguous()  # not -1, which 0 tokens leave open


def fetches_tiles(tensor: Tensor) -> bool:
    """Whether a unit of the tensor's GPU copies tiles by descriptors: without it other kernels are faster."""
    return torch.cuda.get_device_capability(tensor.device) >= (9, 0) if tensor.is_cuda else INTERPRETED


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
