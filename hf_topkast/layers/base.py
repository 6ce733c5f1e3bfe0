"""What all sparse layers share: what they compute, and how they look from outside."""

import torch
from torch import Tensor, nn

from ..block_order import inverse
from ..ops import composite, masked_linear, prepare_one_token, runs_one_token, select_backend
from ..ops.reference import expand_active
from ..ops.reordering import reorder
from ..storage import (
    InputSquares,
    Pattern,
    SparseStorage,
    full,
    local,
    sum_over_ranks,
    unpack_bits,
)
from .readonly import ReadOnlyTensor


class TopKastLayer(SparseStorage):
    """
    What all sparse layers share: the masked product, and views of the weights and sets in the stock layout.

    Attributes:
        gradient_watch (`Callable`, *optional*): called with input and output of each product, while a refresh is going
            to need more gradients than those of B.
        input_watch ([`InputSquares`], *optional*): sees the inputs of passes that gradients are taken of, while a
            refresh is going to need them.
        powerprop_alpha (`float`): what `TopKastConfig.powerprop_alpha` says.
    """

    def _build(
        self,
        dense: nn.Module,
        active: Tensor,
        backward: Tensor,
        backend: str,
        reservoir_device: str,
        block_size: tuple[int, int],
        scatter_blocks: bool,
    ):
        """Takes over weights, bias and mode of `dense`; `active` and `backward` are bool masks of shape (out, in)."""
        self._store(dense, active, backward, reservoir_device, block_size, scatter_blocks)
        self.backend = select_backend(backend)
        self._one_token = None
        self.gradient_watch = self.input_watch = None
        self.powerprop_alpha = 1.0
        self.register_parameter("bias", dense.bias)
        self.train(dense.training)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.gradient_watch = self.input_watch = None  # of the layer that was copied

    def forward(self, x: Tensor) -> Tensor:
        """y = x·αᵀ + b: (..., in) → (..., out)."""
        in_features, out_features = self._features()
        scattered, back = self.row_stride != 1, inverse(self.row_stride, out_features)
        if runs_one_token(x, in_features, self.backend):
            self.check_sets()
            product = self._one_token
            parameters = {"values": self._parameters["values"]} if scattered else self._parameters
            if product is None or not product.fits(parameters, self._buffers):
                values = self.values
                bias = None if scattered else self.bias  # kept through the call: a parametrised bias is made for it
                product = self._one_token = prepare_one_token(values, self.pattern, bias)
            if product is not None and not scattered:
                return product(x)
            if product is not None:
                y, bias = reorder(product(x), back), self.bias
                if bias is None:
                    return y
                if (bias.shape, bias.dtype, bias.device) == (y.shape[-1:], y.dtype, y.device):
                    return y + bias
        bias = self.bias
        if scattered and bias is not None:
            bias = reorder(bias, self.row_stride)
        y = masked_linear(x, self._trained(self.values), self.pattern, bias, self.backend)
        self._show(x, y)
        return reorder(y, back)

    def _show(self, x: Tensor, y: Tensor, *ends: Tensor):
        """Shows a product to whoever watches; one of experts with where the rows of each end."""
        if composite.is_needed():
            return
        if self.gradient_watch is not None:
            self.gradient_watch(x, y, *ends)
        if self.input_watch is not None and y.requires_grad:  # in either mode: from_pretrained gives evaluation mode
            self.input_watch.add_if_trained(y, x, *ends)

    def new_input_watch(self) -> InputSquares:
        """What sees the sizes of this layer's inputs, as its `input_watch`."""
        return InputSquares(self.input_norms.device)

    @property
    def density(self) -> float:
        """|A| / n."""
        return self.active_count / self.numel

    @property
    def backward_density(self) -> float:
        """|B| / n."""
        return self.values.numel() / self.numel

    @property
    def weight(self) -> Tensor:
        """
        α, dense, in the stock layout: a copy, so writing to it is refused. Its gradient reaches the values of B as
        that of the product does, for models that multiply by it themselves; setting its `requires_grad` sets theirs.
        """
        expand = composite.expand_active if composite.is_needed() else _Alpha.apply
        alpha = self.from_grid(expand(self._trained(full(self.values)), self.pattern)).as_subclass(ReadOnlyTensor)
        alpha.source = self.values
        return alpha

    def _trained(self, values: Tensor) -> Tensor:
        """
        The values, with the gradient of what is trained in their place, φ with θ = φ·|φ|^(α−1): dθ/dφ = α·|φ|^(α−1)
        (Powerpropagation, arXiv 2110.00296, equation 1).
        """
        if self.powerprop_alpha == 1:
            return values
        weights = values.detach()
        slope = self.powerprop_alpha * weights.abs().pow(1 - 1 / self.powerprop_alpha)
        return weights + slope * (values - weights)

    @property
    def active_mask(self) -> Tensor:
        """A as a dense bool mask in the stock layout."""
        return self.from_grid(self.pattern.active_mask())

    @property
    def backward_mask(self) -> Tensor:
        """B as a dense bool mask in the stock layout."""
        return self.from_grid(self.pattern.backward_mask())

    @property
    def reservoir_use(self) -> float:
        """Share of the first reservoir that has been in A since (the paper's appendix: about 5%)."""
        total = int(self.initial_reservoir_size)
        if not total:
            return 0.0
        packed = local(self.unvisited)
        unvisited = sum_over_ranks(unpack_bits(packed, 8 * packed.numel()).sum(), self.unvisited)
        return 1 - int(unvisited) / total

    def dense_weight(self) -> Tensor:
        """θ, the full weight with its reservoir, dense, in the stock layout: a copy."""
        return self.from_grid(self.theta())

    def reset_parameters(self):
        """Refuses what `nn.Linear` does: an initialisation would write to a copy of the dense weight, and be lost."""
        raise RuntimeError("A sparse layer cannot be initialised anew: initialise the dense model, then sparsify it.")

    def extra_repr(self) -> str:
        """Shape and densities, as `print(model)` shows them."""
        in_features, out_features = self._features()
        density = "on the meta device" if self.values.is_meta else f"{self.density:.4g}"
        return (
            f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}, "
            f"density={density}, backward_density={self.backward_density:.4g}" + self._blocks_repr()
        )

    def _blocks_repr(self) -> str:
        if self.block_size == (1, 1):
            return ""
        return f", block_size={self.block_size}" + (", scattered" if self.row_stride != 1 else "")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class _Alpha(torch.autograd.Function):
    """α, (out, in), whose gradient goes straight through to all of B (the paper's §2.2)."""

    @staticmethod
    def forward(ctx, values: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        alpha = expand_active(values, pattern)
        return torch.ops.aten._unsafe_view(alpha, alpha.shape)  # no view of a local tensor: may be changed in place

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.flatten()[ctx.pattern.flat_index()], None
