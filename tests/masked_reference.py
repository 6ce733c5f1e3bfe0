"""
Top-KAST as everybody else does it: dense weights, dense gradients and masks. The oracle of the training tests.

It shares no code with the package: selection is one stable sort, the products are dense, and the optimizer holds the
whole weight.
"""

import math

import torch
from scattered_blocks import OrderedProduct
from torch import nn
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


class MaskedLayer(OrderedProduct, nn.Module):
    """A dense layer with masks; its `theta` is (out, in)."""

    def __init__(self, dense: nn.Module, config):
        super().__init__()
        weight = dense.weight.detach().clone()
        self.theta = nn.Parameter(self.order(config, weight.T if isinstance(dense, Conv1D) else weight))
        self.bias = dense.bias
        self.active = torch.ones_like(self.theta, dtype=torch.bool)
        self.backward_set = torch.ones_like(self.active)

    def scores(self) -> torch.Tensor:
        """What the weights are ranked by."""
        return self.theta.detach()

    def norms(self, block_size: list[int]) -> torch.Tensor:
        """L2 norms of the scores of blocks."""
        blocks = self.scores().double().unflatten(1, (-1, block_size[1])).unflatten(0, (-1, block_size[0]))
        return blocks.norm(dim=(1, 3)).to(self.theta.dtype)

    def hold(self, active: torch.Tensor, backward_set: torch.Tensor):
        """Makes masks of blocks the sets."""
        for mask, blocks in ((self.active, active), (self.backward_set, backward_set)):
            sides = [size // count for size, count in zip(mask.shape, blocks.shape)]
            mask.copy_(torch.kron(blocks.int(), torch.ones(sides, dtype=torch.int)).bool())

    def choose(self, densities: tuple[float, float], block_size: list[int], parts: int):
        """A and B as prefixes of one order, by norm and then by flat index, in each of so many equal row ranges."""
        chosen = []
        for norms in self.norms(block_size).chunk(parts):
            order = torch.sort(norms.flatten(), descending=True, stable=True).indices
            sizes = [max(1, round(density * norms.numel())) for density in densities]
            masks = torch.zeros(2, norms.numel(), dtype=torch.bool)
            for mask, size in zip(masks, (sizes[0], max(sizes))):
                mask[order[:size]] = True
            chosen.append(masks.view(2, *norms.shape))
        self.hold(*torch.cat(chosen, dim=1))

    def forward(self, x):
        return self.product(x, StraightThrough.apply(self.theta, self.active), self.bias)


class MaskedTraining:
    """
    The whole method on a dense model, one `step` at a time.

    Schedules begin and end at steps. With `split_fused` a layer is split into as many equal parts as `parts` says by
    the last part of its name. What the optimizer's state starts at, where that is not zero, is said in `starts`, by
    name, as a function of the parameter group and θ; which other second moments it has in `second_moments`.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        config,
        make_optimizer,
        parts: dict[str, int] | None = None,
        starts: dict | None = None,
        second_moments: tuple[str, ...] = (),
    ):
        self.model, self.config, self.parts, self.starts = model, config, parts or {}, starts or {}
        self.second_moments = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", *second_moments)
        self.steps = 0
        self.planned = None
        self.layers = {}
        for name in names:
            parent, _, leaf = name.rpartition(".")
            layer = MaskedLayer(model.get_submodule(name), config)
            setattr(model.get_submodule(parent), leaf, layer)
            self.layers[name] = layer
        thetas = {id(layer.theta) for layer in self.layers.values()}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in thetas]
        self.optimizer = make_optimizer(
            [{"params": rest}, {"params": [layer.theta for layer in self.layers.values()], "weight_decay": 0.0}]
        )
        self.choose()

    def densities(self) -> tuple[float, float]:
        """The densities of A and B that are due now."""
        config = self.config
        density = config.density
        if config.initial_density is not None:
            progress = (self.steps - config.schedule_begin) / (config.schedule_end - config.schedule_begin)
            progress = min(1, max(0, progress))
            way = {
                "linear": progress,
                "cubic": 1 - (1 - progress) ** 3,
                "cosine": (1 - math.cos(math.pi * progress)) / 2,
            }
            density = config.initial_density + (config.density - config.initial_density) * way[config.density_schedule]
        if config.explore_until is not None and self.steps >= config.explore_until:
            return density, density
        return density, min(1, config.backward_density / config.density * density)

    def choose(self):
        """A and B of every layer, in each by itself or in all of them together."""
        if self.config.distribution == "global":
            self.choose_together()
            return
        for name, layer in self.layers.items():
            layer.choose(self.densities(), self.config.block_size, self.parts.get(name.rpartition(".")[2], 1))

    def choose_together(self):
        """The largest weights of all layers in one sort, after the largest of each layer."""
        norms = [layer.norms(self.config.block_size) for layer in self.layers.values()]
        firsts = [torch.arange(each.numel()) == each.argmax() for each in norms]
        ranked = torch.where(torch.cat(firsts), float("inf"), torch.cat([each.flatten() for each in norms]))
        order = torch.sort(ranked, descending=True, stable=True).indices
        chosen = torch.zeros(2, len(order), dtype=torch.bool)
        for mask, density in zip(chosen, self.densities()):
            mask[order[: round(density * len(order))]] = True
        for layer, each, masks in zip(
            self.layers.values(), norms, chosen.split([each.numel() for each in norms], dim=1)
        ):
            layer.hold(*masks.view(2, *each.shape))

    def active_share(self) -> float:
        """The present density over all layers."""
        masks = [layer.active for layer in self.layers.values()]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        self.optimizer.zero_grad()
        losses = []
        for tokens in micro_batches:
            loss = loss_of(self.model, tokens) / len(micro_batches)
            loss.backward()
            losses.append(loss.item())
        before, density = {}, self.active_share()
        with torch.no_grad():
            for name, layer in self.layers.items():
                exploration = layer.backward_set & ~layer.active
                factor = layer.active + exploration.to(layer.theta.dtype) / density
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
            if self.due(self.steps):
                self.refresh()
            lag = self.config.refresh_lag
            if lag and [self.due(self.steps + ahead) for ahead in range(1, lag + 1)] == [False] * (lag - 1) + [True]:
                self.plan()
        return sum(losses)

    def due(self, step: int) -> bool:
        schedule_ends = self.config.initial_density is not None and step == self.config.schedule_end
        return step % self.config.refresh_every == 0 or schedule_ends

    def sets(self) -> list[torch.Tensor]:
        return [mask.clone() for layer in self.layers.values() for mask in (layer.active, layer.backward_set)]

    def set_sets(self, masks: list[torch.Tensor]):
        for layer, active, backward_set in zip(self.layers.values(), masks[::2], masks[1::2]):
            layer.active.copy_(active), layer.backward_set.copy_(backward_set)

    def plan(self):
        """The sets of the next refresh, from the present weights."""
        present, self.steps = self.sets(), self.steps + self.config.refresh_lag
        self.choose()
        self.planned, self.steps = self.sets(), self.steps - self.config.refresh_lag
        self.set_sets(present)

    def refresh(self):
        stored = {name: layer.backward_set.clone() for name, layer in self.layers.items()}
        if self.planned is None:
            self.choose()
        else:
            self.set_sets(self.planned)
        self.planned = None
        for name, layer in self.layers.items():
            self.move_state(layer, stored[name])

    def move_state(self, layer: MaskedLayer, stored: torch.Tensor):
        entering = layer.backward_set & ~stored
        for key, state in self.optimizer.state[layer.theta].items():
            if torch.is_tensor(state) and state.shape == layer.theta.shape:
                mean = state[stored].mean()
                start = self.starts[key](self.optimizer.param_groups[1], layer.theta) if key in self.starts else 0.0
                state.copy_(torch.where(stored & layer.backward_set, state, start))
                if self.config.new_state == "mean" and key in self.second_moments:
                    state[entering] = mean


class OnMembersOnly:
    """
    An optimizer of dense weights that is shown vectors of the members of B, for those that look at a parameter as a
    whole: they clip by its norm, for example. State is kept dense, so that a weight finds its own at its place.
    """

    def __init__(self, make_optimizer, groups: list[dict]):
        self.thetas, self.masks = groups[1]["params"], []
        self.vectors = [nn.Parameter(theta.detach().flatten()) for theta in self.thetas]
        self.inner = make_optimizer([groups[0], {**groups[1], "params": self.vectors}])
        self.param_groups = self.inner.param_groups
        self.state = {theta: {} for theta in self.thetas}

    def zero_grad(self):
        self.inner.zero_grad()
        for theta in self.thetas:
            theta.grad = None

    def step(self):
        for theta, vector, mask in zip(self.thetas, self.vectors, self.masks):
            vector.data, vector.grad = theta.detach()[mask], theta.grad[mask]
            for key, state in self.state[theta].items():
                self.inner.state[vector][key] = state[mask]
        self.inner.step()
        for theta, vector, mask in zip(self.thetas, self.vectors, self.masks):
            theta.masked_scatter_(mask, vector)
            for key, state in self.inner.state[vector].items():
                if torch.is_tensor(state) and state.shape == vector.shape:
                    dense = self.state[theta].setdefault(key, torch.zeros_like(theta))
                    dense.masked_scatter_(mask, state)
