"""
The products of one float32 token on a CPU, with the weights checked and handed over beforehand.

Generation repeats them for every token. They take no longer than their weights take to come from memory, and what
Python would do around them each time as long again.
"""

import torch
from torch import Tensor

from ..native import _native, array, thread_count
from ..storage import Pattern
from .cpu import isa
from .handover import structure


class Prepared:
    """
    What a product keeps from token to token. It reads the weights where they lie: a change in place counts, and `fits`
    says whether they still lie there.
    """

    def __init__(self, values: Tensor, pattern: Pattern, bias: Tensor | None = None):
        self._place = place(values, pattern.row_offsets, pattern.columns, bias)

    def fits(self, parameters: dict[str, Tensor | None], buffers: dict[str, Tensor | None]) -> bool:
        """Whether a layer still has the same tensors. By its tables, for `nn.Module` looks names up more slowly."""
        columns = buffers.get("columns")
        if columns is None:  # offered to FSDP2
            return False
        # A bias that is parametrised is in neither table.
        return self._place == place(parameters["values"], buffers["row_offsets"], columns, parameters.get("bias"))

    def __reduce__(self):  # addresses are of no use in a copy or another process
        return type(None), ()


class OneToken(Prepared):
    """
    y = x·αᵀ + b for one token.

    Args:
        values (`torch.Tensor`): float32, (|B|,), contiguous, on the CPU.
        pattern ([`Pattern`]): where the values stand.
        bias (`torch.Tensor`, *optional*): float32, (out,), contiguous, on the CPU.
    """

    def __init__(self, values: Tensor, pattern: Pattern, bias: Tensor | None):
        super().__init__(values, pattern, bias)
        self._out_features, self._stored = pattern.shape[0], pattern.stored
        bias_address = 0 if bias is None else bias.data_ptr()
        self._multiply = _native.OneToken(isa, structure(pattern), array(values), bias_address).multiply

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), of one token as [`runs_one_token`] finds it."""
        x = x.contiguous()
        y = x.new_empty(*(1,) * (x.ndim - 1), self._out_features)
        self._multiply(thread_count(self._stored), x.data_ptr(), y.data_ptr())
        return y


class ExpertsOfOneToken(Prepared):
    """
    y = x·αₑᵀ + bₑ for one token and each expert e that is chosen for it, in the order in which they are chosen.

    Args:
        values (`torch.Tensor`): float32, (|B|,), contiguous, on the CPU.
        pattern ([`Pattern`]): where the values stand in the (experts · out, in) matrix.
        experts (`int`): how many there are.
    """

    def __init__(self, values: Tensor, pattern: Pattern, experts: int):
        super().__init__(values, pattern)
        self._bias_shape, self._in_features = (experts, pattern.shape[0] // experts), pattern.shape[1]
        self._multiply = _native.ExpertsOfOneToken(isa, structure(pattern), experts, array(values)).multiply

    def takes(self, bias: Tensor | None) -> bool:
        """Whether a bias is one that the product reads."""
        return bias is None or (bias.shape == self._bias_shape and is_readable(bias))

    def __call__(self, x: Tensor, chosen: Tensor, bias: Tensor | None) -> Tensor:
        """
        The products of one token.

        Args:
            x (`torch.Tensor`): float32, (1, in), the same for all experts, or (k, in), one row for each.
            chosen (`torch.Tensor`): int64, (k,), contiguous. Numbers that no expert has give zero.
            bias (`torch.Tensor`, *optional*): (experts, out), as [`takes`] says.

        Returns:
            `torch.Tensor`: (k, out).

        Raises:
            ValueError: if the input is of another type or shape.
        """
        count = len(chosen)
        if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != self._in_features or len(x) not in (1, count):
            raise ValueError(
                f"An input of {x.dtype} and shape {tuple(x.shape)} is not that of one token for {count} sparse "
                f"experts of {self._in_features} inputs: torch.float32, one row, or one for each expert."
            )
        x = x.contiguous()
        y = x.new_empty(count, self._bias_shape[1])
        apart = self._in_features if len(x) > 1 else 0
        addresses = chosen.data_ptr(), count, 0 if bias is None else bias.data_ptr(), x.data_ptr(), apart, y.data_ptr()
        self._multiply(torch.get_num_threads(), *addresses)
        return y


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


def prepare(values: Tensor, pattern: Pattern, bias: Tensor | None, experts: int | None = None) -> Prepared | None:
    """
    The product of a layer's weights, or with a number of experts of those that are chosen; `None` if the weights are
    not of the type and in the place that it reads.
    """
    floats = (values,) if bias is None else (values, bias)
    whole = values.shape == (pattern.stored,) and (bias is None or bias.shape == pattern.shape[:1])
    if not (whole and all(map(is_readable, floats)) and is_readable(pattern.columns, pattern.columns.dtype)):
        return None
    return OneToken(values, pattern, bias) if experts is None else ExpertsOfOneToken(values, pattern, experts)


def is_readable(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the numbers of a tensor lie in memory as the extension reads them."""
    return (
        type(tensor.data) is Tensor
        and tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and tensor.is_contiguous()
    )
