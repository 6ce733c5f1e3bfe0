"""
Tensors for the C++ extension, which knows nothing of torch: checked, made contiguous, and given as addresses.

Its threads are those of torch's own OpenMP pool.
"""

import torch
from torch import Tensor

from ..storage import Pattern
from . import _native


DTYPES = (torch.float32, torch.bfloat16)
# Multiply-adds, or numbers moved, worth waking another thread for.
GRAIN = 2**15


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


def array(tensor: Tensor) -> "_native.Array":
    """Address and item size of a contiguous tensor, which has to live until the call returns."""
    return _native.Array(tensor.data_ptr(), tensor.element_size())


def structure(pattern: Pattern) -> "_native.Pattern":
    """
    The arrays and sizes of a pattern.

    Raises:
        TypeError: if they are not what [`Pattern.from_masks`] makes; the kernels would read past their ends.
    """
    offsets, columns = pattern.row_offsets, pattern.columns
    whole = offsets.is_contiguous() and columns.is_contiguous() and offsets.device.type == columns.device.type == "cpu"
    types = columns.dtype in (torch.int16, torch.int32) and offsets.dtype in (torch.int32, torch.int64)
    if not (whole and types and offsets.numel() == 2 * (pattern.shape[0] // pattern.block_size[0]) + 1):
        raise TypeError(
            "The C++ kernels need a pattern of contiguous integers on the CPU, with 32 or 64 bits for row_offsets and "
            f"16 or 32 for columns, not {offsets.numel()} of {offsets.dtype} and {columns.numel()} of "
            f"{columns.dtype} on {columns.device} for a layer of {pattern.shape}."
        )
    arrays = array(pattern.row_offsets), array(pattern.columns)
    return _native.Pattern(*arrays, *pattern.shape, *pattern.block_size)


def thread_count(work: int) -> int:
    """How many of torch's threads so much work is worth."""
    return max(1, min(torch.get_num_threads(), work // GRAIN))
