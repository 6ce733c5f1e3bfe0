"""
The C++ extension, where it was built: how tensors are handed to it, as addresses, and what it does in torch's stead.

Its threads are those of torch's own OpenMP pool.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


try:
    from . import _native
except ImportError:  # installed without a compiler
    extension = None
else:
    extension = _native

# Multiply-adds, or numbers moved, worth waking another thread for.
GRAIN = None if extension is None else extension.GRAIN

_in_use = extension is not None


def array(tensor: Tensor) -> "extension.Array":
    """Address and item size of a contiguous tensor, which has to live until the call returns."""
    return extension.Array(tensor.data_ptr(), tensor.element_size())


def thread_count(work: int) -> int:
    """How many of torch's threads so much work is worth."""
    return max(1, min(torch.get_num_threads(), work // GRAIN))


def accelerated_by(native: Callable) -> Callable:
    """
    Has a function of tensors that is made of torch's operations done by the extension instead, with equal results, if
    all its tensors are plain numbers on the CPU.

    Args:
        native (`Callable`): takes the same arguments, and returns the same, or `NotImplemented` for what it is not
            for. The function of torch operations then does it, and is at hand as `__wrapped__`.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def chosen(*args, **kwargs):
            if _in_use and _are_plain((*args, *kwargs.values())):
                result = native(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return function(*args, **kwargs)

        return chosen

    return decorate


@contextlib.contextmanager
def torch_only() -> Iterator[None]:
    """Without what `accelerated_by` has the extension do, in this process: to compare results and times."""
    global _in_use
    before, _in_use = _in_use, False
    try:
        yield
    finally:
        _in_use = before


def _are_plain(arguments: tuple) -> bool:
    """Whether tensors among these are numbers in memory that nothing traces, transforms or differentiates."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode()
    ):
        return False
    grad = torch.is_grad_enabled()
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (grad and tensor.requires_grad)
        for tensor in _tensors(arguments)
    )


def _tensors(arguments: tuple) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)
