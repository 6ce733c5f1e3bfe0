"""
A device that is not there: tensors that say they are on it, are computed on the CPU, and refuse to meet those of the
CPU. So what a GPU would refuse, and what would make the host wait for it, shows without one.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_topkast import ops
from hf_topkast.ops import grouped


NAME = "lazy"  # torch knows it, has nothing behind it, and runs its gradients in the caller's thread
COPIES = ("aten::_to_copy", "aten::copy_")
# The host waits for what they find: a number, or how large the result is.
FINDING = "_local_scalar_dense equal allclose nonzero masked_select _unique2 unique_dim unique_consecutive bincount"
READS = {f"aten::{name}" for name in FINDING.split()}


class Elsewhere(Tensor):
    """A tensor on the other device; `numbers` has what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor):
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, device=torch.device(NAME, 0), **layout)

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} outside of `with OtherDevice()`")

    @property
    def data(self) -> Tensor:
        """As `Tensor.data`, which knows of no `numbers`."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor):
        Tensor.data.__set__(self, new)
        self.numbers = new.numbers

    def tolist(self) -> list:
        """As `Tensor.tolist`, which refuses subclasses."""
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Elsewhere({self.numbers})"


class OtherDevice(TorchDispatchMode):
    """
    While it is active, `device="lazy"` is a device.

    Attributes:
        reads (`list[str]`): the operations that made the host wait.
        launches (`list`): what ran on the device, as functions of nothing that write to where they wrote.
    """

    def __init__(self):
        super().__init__()
        self.reads: list[str] = []
        self.launches: list[Callable[[], None]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        if name.startswith("hf_topkast::"):  # ours, of which each operation counts
            with self:
                own = name.replace("hf_topkast::", "_")
                return getattr(grouped if hasattr(grouped, own) else ops, own)._init_fn(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        elsewhere = any(isinstance(tensor, Elsewhere) for tensor in tensors)
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
        if elsewhere and strangers and name not in COPIES:
            raise RuntimeError(f"{name} on two devices: {[(type(one).__name__, tuple(one.shape)) for one in tensors]}")
        to_host = elsewhere and name == "aten::copy_" and not isinstance(args[0], Elsewhere)
        device = kwargs.get("device")
        if device is not None:
            to_host = elsewhere and torch.device(device).type != NAME
            elsewhere = torch.device(device).type == NAME
            kwargs = {**kwargs, "device": torch.device("cpu") if elsewhere else device}
        if to_host or (elsewhere and makes_the_host_wait(name, args, kwargs)):
            self.reads.append(name)
        operands = tree_map(numbers, args), tree_map(numbers, kwargs)
        result = function(*operands[0], **operands[1])
        if elsewhere:
            self.launches.append(partial(again, function, *operands, result))
        if function._schema.is_mutable and isinstance(result, Tensor):
            return kwargs.get("out", args[0])
        return tree_map(wrapped, result) if elsewhere else result


def makes_the_host_wait(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether an operation has to know numbers of a tensor before the next one can be launched."""
    if name.startswith(("aten::index", "aten::_unsafe_index")) and isinstance(args[1], (list, tuple)):
        return any(index is not None and index.dtype == torch.bool for index in args[1])  # a mask
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return name in READS


def again(function, args, kwargs, result):
    """Runs an operation once more, and writes what it gives to where its result is, as a CUDA graph does."""
    for fresh, place in zip(tree_leaves(function(*args, **kwargs)), tree_leaves(result), strict=True):
        if isinstance(place, Tensor) and fresh is not place:
            place.copy_(fresh)


def numbers(value):
    """What a tensor of the other device holds; anything else as it is."""
    return value.numbers if isinstance(value, Elsewhere) else value


def wrapped(value):
    """A tensor as one of the other device; anything else as it is."""
    return Elsewhere(value) if isinstance(value, Tensor) else value
