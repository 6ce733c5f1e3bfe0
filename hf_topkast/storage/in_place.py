"""Other numbers, and another number of them, in a tensor of a module that stays the same object."""

import torch
from torch import Tensor, nn


def rewrite(module: nn.Module, name: str, new: Tensor):
    """
    Gives a parameter or buffer the numbers of `new`, which may be another size, in the dtype and on the device that it
    has. Optimizers and hooks keep hold of it, and where the size stays a CUDA graph goes on reading it.
    """
    current = getattr(module, name)
    if current.shape == new.shape:
        current.copy_(new)
        return
    dtype = current.dtype
    with torch.inference_mode(False):  # training could not go on with tensors made in it
        # A loss of the last step that is still referenced keeps autograd's accumulator of the former size alive; only
        # a change of dtype makes torch drop it.
        current.data = current.new_empty(0, dtype=torch.float64 if dtype != torch.float64 else torch.float32)
        # In memory of its own: `new` may be part of a state dict.
        current.data = current.new_empty(new.shape, dtype=dtype).copy_(new)
    # Up to torch 2.11 a compiled model looks at a module's tensors again only if their dictionary has changed.
    for tensors in (module._parameters, module._buffers):
        unchanged = dict(tensors)
        tensors.clear()
        tensors.update(unchanged)
