"""The sparse layer of a block's experts: many matrices of one size in the place of a 3-D parameter."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..block_order import inverse
from ..ops import prepare_one_token
from ..ops.grouped import grouped_linear
from ..ops.reordering import reorder
from ..storage import ExpertSquares
from .base import TopKastLayer
from .stacked import GroupedProduct


if TYPE_CHECKING:
    from ..ops.one_token import ExpertsOfOneToken
    from .experts import ExpertStack


class TopKastGroupedLinear(GroupedProduct, TopKastLayer):
    """
    A Top-KAST layer in the place of the 3-D parameter in which a mixture-of-experts block holds one matrix of each
    expert. It is a child module under the parameter's name. Every expert has sets of its own.

    Args:
        dense ([`ExpertStack`]): the parameter.
        active (`torch.Tensor`): bool, (experts · out, in): the set A.
        backward (`torch.Tensor`): bool, (experts · out, in): the set B ⊇ A.
        backend (`str`, *optional*, defaults to `"auto"`): implementation of the masked products.
        reservoir_device (`str`, *optional*, defaults to `"same"`): where θ outside B rests.
        block_size (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): (rows, columns) of a block; the sets hold
            whole blocks.
        scatter_blocks (`bool`, *optional*, defaults to `False`): whether the rows of a block lie far apart in the
            layer; the rows of the sets are in the order of their grid then, see [`to_grid`].

    Attributes:
        experts (`int`): how many there are.
        in_features, out_features (`int`): of one expert.
        halves (`str`, *optional*): how gate and up lie in an expert's rows, see [`ExpertStack`].
    """

    def __init__(
        self,
        dense: "ExpertStack",
        active: Tensor,
        backward: Tensor,
        backend: str = "auto",
        reservoir_device: str = "same",
        block_size: tuple[int, int] = (1, 1),
        scatter_blocks: bool = False,
    ):
        nn.Module.__init__(self)
        self.stores_transposed, self.halves = dense.stores_transposed, dense.halves
        self.experts, self.out_features, self.in_features = dense.experts, dense.out_features, dense.in_features
        self._build(dense, active, backward, backend, reservoir_device, block_size, scatter_blocks)

    @property
    def matrices(self) -> int:
        """As many as experts."""
        return self.experts

    def _features(self) -> tuple[int, int]:
        return self.in_features, self.experts * self.out_features

    @staticmethod
    def stock_name(name: str) -> str:
        """That of the parameter, which is the layer's own."""
        return name

    def forward(self, x: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """
        y = x·αₑᵀ + bₑ for the rows of each expert e.

        Args:
            x (`torch.Tensor`): (rows, in), sorted by expert.
            ends (`torch.Tensor`): int32, (experts,): where the rows of each expert end. The products of rows past the
                last end are zero.
            bias (`torch.Tensor`, *optional*): (experts, out).

        Returns:
            `torch.Tensor`: (rows, out).
        """
        bias = None if bias is None else reorder(bias, self.row_stride)
        y = grouped_linear(x, ends, self._trained(self.values), self.pattern, bias, self.backend)
        self._show(x, y, ends)
        return reorder(y, inverse(self.row_stride, self.out_features))

    def for_one_token(self) -> "ExpertsOfOneToken | None":
        """
        The products of one token where [`runs_one_token`] finds one, or `None` if they are not for the type or place
        of the weights, or if somebody has to see the layer being called. Outputs are in the order of the grid.
        """
        if self._forward_pre_hooks or self._forward_hooks or "forward" in vars(self):
            return None
        self.check_sets()
        product = self._one_token
        if product is None or not product.fits(self._parameters, self._buffers):
            product = self._one_token = prepare_one_token(self.values, self.pattern, None, self.experts)
        return product

    def new_input_watch(self) -> ExpertSquares:
        """What sees the sizes of each expert's inputs, as the layer's `input_watch`."""
        return ExpertSquares(self.input_norms.device)

    def to_dense(self, weight: Tensor) -> nn.Parameter:
        """The 3-D parameter with the given weight."""
        return nn.Parameter(weight, requires_grad=self.values.requires_grad)

    def extra_repr(self) -> str:
        """Shape and densities, as `print(model)` shows them."""
        density = "on the meta device" if self.values.is_meta else f"{self.density:.4g}"
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"density={density}, backward_density={self.backward_density:.4g}" + self._blocks_repr()
        )


class GroupedLinear(GroupedProduct, nn.Module):
    """
    The dense layer in the place of a 3-D parameter, for as long as somebody wants to see its inputs.

    Args:
        dense ([`ExpertStack`]): the parameter, which the layer shares.
    """

    def __init__(self, dense: "ExpertStack"):
        super().__init__()
        self.stores_transposed = dense.stores_transposed
        self.experts, self.out_features, self.in_features = dense.experts, dense.out_features, dense.in_features
        self.weight = dense.weight
        self._is_hf_initialized = True

    def forward(self, x: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """As [`TopKastGroupedLinear.forward`], without a formula for derivatives."""
        y = x.new_zeros(len(x), self.out_features)
        for expert, (first, last) in enumerate(zip([0, *ends.tolist()], ends.tolist())):
            matrix = self.weight[expert].T if self.stores_transposed else self.weight[expert]
            own = None if bias is None else bias[expert]
            y[first:last] = torch.nn.functional.linear(x[first:last], matrix, own)
        return y
