"""The sparse layers: `nn.Linear` and GPT-2's `Conv1D` of which only the weights of B are parameters."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..block_order import row_stride
from ..config import TopKastConfig
from ..storage import to_grid
from .base import TopKastLayer
from .experts import ExpertStack
from .grouped import TopKastGroupedLinear


class TopKastLinear(TopKastLayer, nn.Linear):
    """
    A Top-KAST layer in the place of an `nn.Linear`; `isinstance(layer, nn.Linear)` holds, so that tools find it.

    Args:
        dense (`torch.nn.Linear`): the layer whose weight and bias it takes over.
        active (`torch.Tensor`): bool, (out, in): the set A.
        backward (`torch.Tensor`): bool, (out, in): the set B ⊇ A.
        backend (`str`, *optional*, defaults to `"auto"`): implementation of the masked products.
        reservoir_device (`str`, *optional*, defaults to `"same"`): where θ outside B rests.
        block_size (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): (rows, columns) of a block; the sets hold
            whole blocks.
        scatter_blocks (`bool`, *optional*, defaults to `False`): whether the rows of a block lie far apart in the
            layer; the rows of the sets are in the order of their grid then, see [`to_grid`].
    """

    def __init__(
        self,
        dense: nn.Linear,
        active: Tensor,
        backward: Tensor,
        backend: str = "auto",
        reservoir_device: str = "same",
        block_size: tuple[int, int] = (1, 1),
        scatter_blocks: bool = False,
    ):
        nn.Module.__init__(self)  # not nn.Linear's: that would allocate the dense weight
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self._build(dense, active, backward, backend, reservoir_device, block_size, scatter_blocks)

    def _features(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def to_dense(self, weight: Tensor) -> nn.Linear:
        """The `nn.Linear` with the given (out, in) weight and this layer's bias."""
        dense = nn.Linear(*self._features(), bias=False, device="meta", dtype=weight.dtype)
        return _fill(dense, self, weight)


class TopKastConv1D(TopKastLayer, Conv1D):
    """
    A Top-KAST layer in the place of GPT-2's `Conv1D`, whose weight is stored as (in, out).

    Args:
        dense (`transformers.pytorch_utils.Conv1D`): the layer whose weight and bias it takes over.
        active (`torch.Tensor`): bool, (out, in): the set A.
        backward (`torch.Tensor`): bool, (out, in): the set B ⊇ A.
        backend (`str`, *optional*, defaults to `"auto"`): implementation of the masked products.
        reservoir_device (`str`, *optional*, defaults to `"same"`): where θ outside B rests.
        block_size (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): (rows, columns) of a block; the sets hold
            whole blocks.
        scatter_blocks (`bool`, *optional*, defaults to `False`): whether the rows of a block lie far apart in the
            layer; the rows of the sets are in the order of their grid then, see [`to_grid`].
    """

    stores_transposed = True

    def __init__(
        self,
        dense: Conv1D,
        active: Tensor,
        backward: Tensor,
        backend: str = "auto",
        reservoir_device: str = "same",
        block_size: tuple[int, int] = (1, 1),
        scatter_blocks: bool = False,
    ):
        nn.Module.__init__(self)  # not Conv1D's: that would allocate the dense weight
        self.nx, self.nf = dense.nx, dense.nf
        self._build(dense, active, backward, backend, reservoir_device, block_size, scatter_blocks)

    def _features(self) -> tuple[int, int]:
        return self.nx, self.nf

    def to_dense(self, weight: Tensor) -> Conv1D:
        """The `Conv1D` with the given (in, out) weight and this layer's bias."""
        with torch.device("meta"):
            dense = Conv1D(self.nf, self.nx)
        return _fill(dense, self, weight)


def _fill(dense: nn.Module, layer: TopKastLayer, weight: Tensor) -> nn.Module:
    dense.weight = nn.Parameter(weight, requires_grad=layer.values.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)


SPARSE_TYPES: dict[type[nn.Module], type[TopKastLayer]] = {nn.Linear: TopKastLinear, Conv1D: TopKastConv1D}


def sparse_type(module: nn.Module | ExpertStack) -> type[TopKastLayer] | None:
    """
    The sparse layer that can take the place of a module or of a parameter of experts, or `None` if the module is no
    plain projection.
    """
    if isinstance(module, ExpertStack):
        return TopKastGroupedLinear
    exact = SPARSE_TYPES.get(type(module))
    if exact is not None or isinstance(module, TopKastLayer) or not isinstance(module, nn.Linear):
        return exact
    return TopKastLinear if _computes_as_linear(module) else None


def _computes_as_linear(module: nn.Linear) -> bool:
    """Whether a subclass does the same as `nn.Linear`; quantised and LoRA layers, and routers, do something else."""
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers(), *module.named_children()]}
    if names - {"weight", "bias"}:
        return False
    if module.weight.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, module.in_features, generator=generator).to(module.weight)
    with torch.no_grad():
        expected = nn.functional.linear(x, module.weight, module.bias)
        try:
            output = type(module).forward(module, x)
        except Exception:  # a class we do not know may raise anything where it is no projection
            return False
    return torch.is_tensor(output) and output.shape == expected.shape and torch.allclose(output, expected, 1e-2, 1e-3)


def shape_of(dense: nn.Module | ExpertStack) -> tuple[int, int]:
    """(out, in) of a convertible layer, of experts (experts · out, in)."""
    if isinstance(dense, ExpertStack):
        return dense.matrix_shape
    shape = tuple(dense.weight.shape)
    return shape[::-1] if sparse_type(dense).stores_transposed else shape


def weight_grid(dense: nn.Module | ExpertStack, config: TopKastConfig) -> Tensor:
    """
    The weight of a convertible layer, (out, in) whatever its stock layout, as the sparse one is going to keep it;
    detached.
    """
    layout = dense if isinstance(dense, ExpertStack) else sparse_type(dense)
    rows, matrices = layout.to_rows(dense.weight.detach()), getattr(dense, "experts", 1)
    stride = row_stride(rows.shape[0] // matrices, config.block_size[0], config.scatter_blocks)
    return to_grid(rows, stride, matrices)
