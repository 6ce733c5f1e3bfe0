"""Scattered blocks as a dense layer and a list of indices: what the oracles of the training tests need of them."""

import math

import torch


def order_of_rows(config, size: int) -> torch.Tensor:
    """Which output each row of the grid of blocks is, of so many: every s-th, s next to the golden section of them."""
    if not config.scatter_blocks or config.block_size[0] == 1:
        return torch.arange(size)
    coprime = [step for step in range(1, size + 1) if math.gcd(step, size) == 1]
    step = min(coprime, key=lambda step: (abs(step - round((math.sqrt(5) - 1) / 2 * size)), -step))
    return torch.tensor([place * step % size for place in range(size)])


class OrderedProduct:
    """The part of an oracle's layer that multiplies by a weight whose rows are in such an order."""

    def order(self, config, weight: torch.Tensor) -> torch.Tensor:
        """Takes the order of a layer with this weight, (out, in), and gives the weight in it."""
        self.rows = order_of_rows(config, len(weight))
        return weight[self.rows].contiguous()

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """y = x·Wᵀ + b, in the layer's own order."""
        bias = None if bias is None else bias[self.rows]
        return torch.nn.functional.linear(x, weight, bias)[..., self.rows.argsort()]
