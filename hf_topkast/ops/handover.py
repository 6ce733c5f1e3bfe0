"""
Operands of products for the C++ extension, which knows nothing of torch: checked, and made contiguous.
"""

import torch
from torch import Tensor

from ..native import _native
from ..storage import Pattern, passes


DTYPES = (torch.float32, torch.bfloat16)


def as_rows(tensor: Tensor, features: int) -> Tensor:
    """
    (..., features) as a contiguous (tokens, features).

    Raises:
        ValueError: if the last dimension is another one.
        TypeError: as [`checked`] says.
    """
    if tensor.shape[-1] != features:
        raise ValueError(f"The last dimension of {tuple(tensor.shape)} is not the layer's {features}.")
    rows = tensor.numel() // features  # not -1, which 0 tokens leave open
    return checked(tensor).reshape(rows, features).contiguous()


def checked(tensor: Tensor) -> Tensor:
    """
    The tensor itself, if the extension can read it.

    Raises:
        TypeError: if it is not float32 or bfloat16 on the CPU.
    """
    if tensor.dtype not in DTYPES or tensor.device.type != "cpu":
        raise TypeError(
            f"The C++ kernels multiply float32 and bfloat16 tensors on the CPU, not {tensor.dtype} on "
            f"{tensor.device}; backend='auto' chooses by tensor."
        )
    return tensor


def structure(pattern: Pattern) -> "_native.Pattern":
    """
    The arrays and sizes of a pattern.

    Raises:
        TypeError: if they are not what [`Pattern.from_masks`] makes; the kernels would read past their ends.
    """
    if not passes.is_laid_out(pattern):
        offsets, columns = pattern.row_offsets, pattern.columns
        raise TypeError(
            "The C++ kernels need a pattern of contiguous integers on the CPU, with 32 or 64 bits for row_offsets and "
            f"16 or 32 for columns, not {offsets.numel()} of {offsets.dtype} and {columns.numel()} of "
            f"{columns.dtype} on {columns.device} for a layer of {pattern.shape}."
        )
    return passes.structure(pattern)
