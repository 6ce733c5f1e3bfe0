"""
The product of one float32 token on a CPU, with the weights checked and handed over beforehand.

Generation repeats it for every token. It takes no longer than its weights take to come from memory, and what Python
would do around it each time as long again.
"""

import torch
from torch import Tensor

from ..native import _native, array, thread_count
from ..storage import Pattern
from .cpu import isa
from .handover import structure


class OneToken:
    """
    y = x·αᵀ + b for one token. It reads the weights where they lie: a change in place counts, and `fits` says whether
    they still lie there.

    Args:
        values (`torch.Tensor`): float32, (|B|,), contiguous, on the CPU.
        pattern ([`Pattern`]): where the values stand.
        bias (`torch.Tensor`, *optional*): float32, (out,), contiguous, on the CPU.
    """

    def __init__(self, values: Tensor, pattern: Pattern, bias: Tensor | None):
        self._out_features, self._stored = pattern.shape[0], pattern.stored
        self._place = place(values, pattern.row_offsets, pattern.columns, bias)
        bias_address = 0 if bias is None else bias.data_ptr()
        self._multiply = _native.OneToken(isa, structure(pattern), array(values), bias_address).multiply

    def fits(self, parameters: dict[str, Tensor | None], buffers: dict[str, Tensor | None]) -> bool:
        """Whether a layer still has the same tensors. By its tables, for `nn.Module` looks names up more slowly."""
        columns = buffers.get("columns")
        if columns is None:  # offered to FSDP2
            return False
        # A bias that is parametrised is in neither table.
        return self._place == place(parameters["values"], buffers["row_offsets"], columns, parameters.get("bias"))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), of one token as [`runs_one_token`] finds it."""
        x = x.contiguous()
        y = x.new_empty(*(1,) * (x.ndim - 1), self._out_features)
        self._multiply(thread_count(self._stored), x.data_ptr(), y.data_ptr())
        return y

    def __reduce__(self):  # addresses are of no use in a copy or another process
        return type(None), ()


def place(values: Tensor, row_offsets: Tensor, columns: Tensor, bias: Tensor | None) -> tuple:
    """What changes when one of a layer's tensors moves to other memory, or lies there in another way."""
    own = () if bias is None else (bias.data_ptr(), bias.dtype, bias.is_contiguous(), bias.numel())
    return (
        values.data_ptr(),
        values.dtype,
        values.is_contiguous(),
        values.numel(),
        row_offsets.data_ptr(),
        columns.data_ptr(),
        columns.numel(),
        *own,
    )


def prepare(values: Tensor, pattern: Pattern, bias: Tensor | None) -> OneToken | None:
    """The product of a layer's weights, or `None` if they are not of the type and in the place that it reads."""
    tensors = (values, pattern.columns) if bias is None else (values, pattern.columns, bias)
    floats = all(tensor.dtype == torch.float32 for tensor in (tensors[0], *tensors[2:]))
    readable = all(type(tensor.data) is Tensor and tensor.device.type == "cpu" for tensor in tensors)
    whole = values.shape == (pattern.stored,) and (bias is None or bias.shape == pattern.shape[:1])
    if not (floats and readable and whole and all(tensor.is_contiguous() for tensor in tensors)):
        return None
    return OneToken(values, pattern, bias)
