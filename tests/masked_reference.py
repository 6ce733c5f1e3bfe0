"""
Top-KAST as everybody else does it: dense weights, dense gradients and masks. The oracle of the training tests.

It shares no code with the package: selection is one stable sort, the products are dense, and the optimizer holds the
whole weight.
"""

import torch
from torch import nn
from torch.nn import functional
from toy_models import loss_of
from transformers.pytorch_utils import Conv1D


class StraightThrough(torch.autograd.Function):
    """α in the forward pass, the whole gradient in the backward pass."""

    @staticmethod
    def forward(ctx, theta, active):
        return theta * active

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class MaskedLayer(nn.Module):
    """A dense layer with masks; its `theta` is (out, in)."""

    def __init__(self, dense: nn.Module):
        super().__init__()
        weight = dense.weight.detach().clone()
        self.theta = nn.Parameter(weight.T.contiguous() if isinstance(dense, Conv1D) else weight)
        self.bias = dense.bias
        self.active = torch.ones_like(self.theta, dtype=torch.bool)
        self.backward_set = torch.ones_like(self.active)

    def choose(self, density: float, backward_density: float, block_size: list[int]):
        """A and B as prefixes of one order of the blocks: by L2 norm, then by flat index."""
        height, width = block_size
        rows, columns = (size // side for size, side in zip(self.theta.shape, block_size))
        blocks = self.theta.detach().double().view(rows, height, columns, width)
        norms = blocks.norm(dim=(1, 3)).to(self.theta.dtype).flatten()
        order = torch.sort(norms, descending=True, stable=True).indices
        size = max(1, round(density * norms.numel()))
        backward_size = max(size, round(backward_density * norms.numel()))
        for mask, count in ((self.active, size), (self.backward_set, backward_size)):
            chosen = torch.zeros(rows * columns, dtype=torch.bool)
            chosen[order[:count]] = True
            mask.copy_(chosen.view(rows, 1, columns, 1).expand_as(blocks).reshape(mask.shape))

    def forward(self, x):
        return functional.linear(x, StraightThrough.apply(self.theta, self.active), self.bias)


class MaskedTraining:
    """The whole method on a dense model, one `step` at a time."""

    def __init__(self, model: nn.Module, names: list[str], config, make_optimizer):
        self.model, self.config = model, config
        self.layers = {}
        for name in names:
            parent, _, leaf = name.rpartition(".")
            layer = MaskedLayer(model.get_submodule(name))
            layer.choose(config.density, config.backward_density, config.block_size)
            setattr(model.get_submodule(parent), leaf, layer)
            self.layers[name] = layer
        thetas = {id(layer.theta) for layer in self.layers.values()}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in thetas]
        self.optimizer = make_optimizer(
            [{"params": rest}, {"params": [layer.theta for layer in self.layers.values()], "weight_decay": 0.0}]
        )
        self.steps = 0

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        self.optimizer.zero_grad()
        losses = []
        for tokens in micro_batches:
            loss = loss_of(self.model, tokens) / len(micro_batches)
            loss.backward()
            losses.append(loss.item())
        before = {}
        with torch.no_grad():
            for name, layer in self.layers.items():
                exploration = layer.backward_set & ~layer.active
                factor = layer.active + exploration.to(layer.theta.dtype) / self.config.density
                layer.theta.grad *= layer.backward_set
                if self.config.penalty_mode == "coupled":
                    layer.theta.grad += self.config.penalty * factor * layer.theta
                else:
                    lr = self.optimizer.param_groups[1]["lr"]
                    layer.theta *= 1 - lr * self.config.penalty * factor
                before[name] = layer.theta.detach().clone()
            self.optimizer.step()
            self.steps += 1
            for name, layer in self.layers.items():
                exploration = layer.backward_set & ~layer.active
                scaled = before[name] + self.config.exploration_lr_scale * (layer.theta - before[name])
                layer.theta.copy_(torch.where(exploration, scaled, layer.theta))
                if self.steps % self.config.refresh_every == 0:
                    self.refresh(layer)
        return sum(losses)

    def refresh(self, layer: MaskedLayer):
        stored = layer.backward_set.clone()
        layer.choose(self.config.density, self.config.backward_density, self.config.block_size)
        entering = layer.backward_set & ~stored
        for key, state in self.optimizer.state[layer.theta].items():
            if torch.is_tensor(state) and state.shape == layer.theta.shape:
                mean = state[stored].mean()
                state[~layer.backward_set] = 0
                if self.config.new_state == "mean" and key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg"):
                    state[entering] = mean
