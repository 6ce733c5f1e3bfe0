"""A tensor that can be read and not written to, for a dense copy of numbers that live elsewhere."""

import re

import torch
from torch import Tensor


# Under these names torch dispatches a write: `x.add_(1)`, `x += 1`, `x[0] = 1`, `x.data = y`, `init.normal_(x)`.
WRITE = re.compile(
    r"\w*[^_]_|__i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__|__set(item)?__"
)


FREEZING = (Tensor.requires_grad.__set__, Tensor.requires_grad_)


class ReadOnlyTensor(Tensor):
    """
    A tensor whose in-place operations raise, and so do those of its views. What is computed from it is ordinary.

    Without it `layer.weight.data += delta`, which is how adapters are merged and weights initialised, would change a
    copy and be lost without a word. What is asked of its `requires_grad` is asked of the parameter that it stands for,
    its attribute `source`: so a layer can be frozen by its weight, as adapters do.
    """

    source: torch.nn.Parameter | None = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FREEZING and args[0].source is not None:
            args[0].source.requires_grad_(*args[1:], **kwargs)
            return args[0]
        written = (*args[:1], *kwargs.values()) if WRITE.fullmatch(func.__name__) else (kwargs.get("out"),)
        if any(isinstance(tensor, cls) for tensor in written):
            raise RuntimeError(
                f"'{func.__name__}' writes to the weight of a sparse layer, which is a dense copy of its values: it "
                "would be lost. If the model does so itself, name the layer in exclude_modules. To merge an adapter "
                "call densify(model) first, or keep it beside the sparse model; to change weights write to "
                "layer.values; to work on the copy take layer.weight.clone()."
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if type(result) is Tensor and any(isinstance(x, cls) and torch._C._is_alias_of(x, result) for x in args):
                return result.as_subclass(cls)
        return result

    def __deepcopy__(self, memo) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol):
        return self.clone().__reduce_ex__(protocol)
