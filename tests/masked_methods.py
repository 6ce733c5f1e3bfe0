"""
Every method as dense tensors and masks: the oracle of the tests of methods.

It shares no code with the package: its own sorts, its own drop share, the dense gradient by dense autograd. Only the
seeds of random draws are those that the package documents, for the draws have to be the same.
"""

import hashlib
import math

import torch
from scattered_blocks import OrderedProduct
from torch import nn
from toy_models import loss_of
from transformers.pytorch_utils import Conv1D


class Straight(torch.autograd.Function):
    """The active weights in the forward pass, the whole gradient in the backward pass."""

    @staticmethod
    def forward(ctx, weight, active):
        return weight * active

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class MethodLayer(OrderedProduct, nn.Module):
    """A dense layer with masks. What is trained is `phi`, (out, in); the weight is φ·|φ|^(α−1)."""

    def __init__(self, dense: nn.Module, config):
        super().__init__()
        weight = dense.weight.detach().clone()
        weight = self.order(config, weight.T if isinstance(dense, Conv1D) else weight)
        self.alpha = alpha = config.powerprop_alpha
        self.phi = nn.Parameter(weight.sign() * weight.abs() ** (1 / alpha) if alpha != 1 else weight)
        self.bias = dense.bias
        self.active = torch.ones_like(self.phi, dtype=torch.bool)
        self.backward_set = torch.ones_like(self.active)
        self.gradient = torch.zeros_like(self.phi)  # dense, of the present step

    def weight(self) -> torch.Tensor:
        return self.phi if self.alpha == 1 else self.phi * self.phi.abs() ** (self.alpha - 1)

    def forward(self, x):
        return self.product(x, Straight.apply(self.weight(), self.active), self.bias)


class AgedAdam:
    """Adam with a step count for each weight; `rest` are other groups, for an optimizer of torch."""

    def __init__(self, groups, rest, betas=(0.9, 0.999), eps=1e-8, warmup=0, amsgrad=False, maximize=False):
        self.rest, self.group = rest, groups
        self.betas, self.eps, self.warmup, self.amsgrad, self.maximize = betas, eps, warmup, amsgrad, maximize
        self.param_groups = [*rest.param_groups, groups]
        names = ("first", "second", "largest", "age", "newcomer")
        self.state = {p: {name: torch.zeros_like(p) for name in names} for p in groups["params"]}

    def zero_grad(self):
        self.rest.zero_grad()
        for phi in self.group["params"]:
            phi.grad = None

    def step(self):
        self.rest.step()
        for phi in self.group["params"]:
            s, g = self.state[phi], -phi.grad if self.maximize else phi.grad
            s["age"] += 1
            s["first"].mul_(self.betas[0]).add_(g, alpha=1 - self.betas[0])
            s["second"].mul_(self.betas[1]).add_(g * g, alpha=1 - self.betas[1])
            s["largest"] = torch.maximum(s["largest"], s["second"])
            first = s["first"] / (1 - self.betas[0] ** s["age"])
            second = (s["largest"] if self.amsgrad else s["second"]) / (1 - self.betas[1] ** s["age"])
            change = self.group["lr"] * first / (second.sqrt() + self.eps)
            if self.warmup:
                change *= torch.where(s["newcomer"] > 0, (s["age"] / self.warmup).clamp(max=1), 1)
            phi -= change

    def enter(self, phi, entering):
        """These weights are new."""
        self.state[phi]["newcomer"][entering] = 1


def largest(scores: torch.Tensor, count: int, among: torch.Tensor) -> torch.Tensor:
    """The `count` largest scores among those marked; of equal ones the first."""
    ranked = torch.where(among, scores, -1.0).flatten()
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.sort(ranked, descending=True, stable=True).indices[: min(count, int(among.sum()))]] = True
    return mask.view(scores.shape)


class MethodTraining:
    """
    A method on a dense model, one `step` at a time.

    Args:
        model, names, config: the dense model, the layers that are sparse, the settings.
        make_optimizer: gives an optimizer of two groups, of which the second has the sparse weights.
        parts: into how many equal parts of its rows a layer is split, by the last part of its name.
        total_steps: of the training.
    """

    def __init__(self, model, names, config, make_optimizer, parts=None, total_steps=None):
        self.model, self.config, self.parts, self.total_steps = model, config, parts or {}, total_steps
        self.steps = 0
        self.planned = None
        self.layers = {}
        for name in names:
            parent, _, leaf = name.rpartition(".")
            layer = MethodLayer(model.get_submodule(name), config)
            setattr(model.get_submodule(parent), leaf, layer)
            self.layers[name] = layer
        sparse = [layer.phi for layer in self.layers.values()]
        rest = [p for p in model.parameters() if not any(p is phi for phi in sparse)]
        self.optimizer = make_optimizer([{"params": rest}, {"params": sparse, "weight_decay": 0.0}])
        self.optimizer.param_groups[-1]["lr"] *= config.lr_scale
        self.shown = {}
        with torch.no_grad():
            self.hold(self.choose(-1, first=True))

    # When

    def moment(self, value):
        return None if value is None else int(value) if value > 1 or value == 0 else round(value * self.total_steps)

    def density(self, step: int) -> float:
        config = self.config
        if config.initial_density is None:
            return config.density
        begin, end = self.moment(config.schedule_begin), self.moment(config.schedule_end)
        progress = min(1, max(0, (step - begin) / (end - begin)))
        way = {"linear": progress, "cubic": 1 - (1 - progress) ** 3, "cosine": (1 - math.cos(math.pi * progress)) / 2}
        return config.initial_density + (config.density - config.initial_density) * way[config.density_schedule]

    def share(self, step: int) -> float:
        """Of A, to be exchanged."""
        config, until = self.config, self.moment(self.config.update_until)
        if step > until:
            return 0.0
        if config.drop_decay == "staged":
            return config.drop_share * (1 if step <= 0.75 * until else 0.5)
        if config.drop_decay == "cosine":
            return config.drop_end + (config.drop_share - config.drop_end) / 2 * (1 + math.cos(math.pi * step / until))
        return config.drop_share

    def due(self, step: int) -> bool:
        config = self.config
        if config.method.startswith("static"):
            return False
        end = self.moment(config.schedule_end)
        if step == end:
            return True
        over = config.update_until is not None and step > self.moment(config.update_until)
        return step % config.refresh_every == 0 and not (over and (end is None or step > end))

    # Which

    def generator(self, step: int, name: str, part: int) -> torch.Generator:
        seed = hashlib.blake2b(f"{self.config.seed}/{step}/{name}/{part}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed, "big"))

    def norms(self, weight: torch.Tensor) -> torch.Tensor:
        height, width = self.config.block_size
        return weight.unflatten(1, (-1, width)).unflatten(0, (-1, height)).square().sum((1, 3)).sqrt()

    def choose(self, step: int, first: bool = False) -> dict:
        """A and B of every layer, spread to weights."""
        chosen = {}
        for name, layer in self.layers.items():
            height, width = self.config.block_size
            weight = layer.weight().detach()
            scores, gradients = self.norms(weight), self.norms(layer.gradient)
            shown = self.norms(self.shown.get(name, torch.zeros_like(weight)) * layer.active)
            active, backward = (mask[::height, ::width] for mask in (layer.active, layer.backward_set))
            count = self.parts.get(name.rpartition(".")[2], 1)
            rows = zip(*(each.chunk(count) for each in (scores, gradients, shown, active, backward)))
            pairs = []
            for part, pieces in enumerate(rows):
                generator = self.generator(step, name, part)
                pairs.append(self.choose_part(step, first, *pieces, generator))
            grow = torch.ones(height, width, dtype=torch.int)
            masks = (torch.cat(each) for each in zip(*pairs))
            chosen[name] = tuple(torch.kron(mask.int(), grow).bool() for mask in masks)
        return chosen

    def choose_part(self, step, first, scores, gradients, shown, active, backward, generator):
        config, n, everything = self.config, scores.numel(), torch.ones_like(active)

        def random(candidates, count):
            places = candidates.flatten().nonzero().flatten()
            mask = torch.zeros(n, dtype=torch.bool)
            mask[places[torch.randperm(len(places), generator=generator)[:count]]] = True
            return mask.view(candidates.shape)

        if config.density == "nonzero":
            size = int((scores != 0).sum()) if first else int(active.sum())
            if first:
                return (scores != 0,) * 2
            backward_size = size
        else:
            density = self.density(0 if first else step)
            size = min(n, max(1, round(density * n)))
            ratio = config.backward_density / config.density
            explores = config.explore_until is None or step < self.moment(config.explore_until)
            backward_size = max(size, round(min(1, density * ratio) * n)) if explores else size
        method = config.method
        if method in ("topkast", "static", "dpf"):
            return largest(scores, size, everything), largest(scores, backward_size, everything)
        if method == "topkast_random":
            new = largest(scores, size, everything)
            return new, new | random(~new, backward_size - size)
        if method == "static_random":
            new = random(everything, size)
            return new, new | random(~new, backward_size - size)
        if method == "magnitude_pruning":
            new = largest(scores, size, active if not first else everything)
            return new, new
        if first:
            return (random(everything, size),) * 2
        had = int(active.sum())
        exchanged = round(self.share(step) * min(size, had))
        if method == "gse":
            outside = (~active).flatten().nonzero().flatten()
            wanted = min(len(outside), exchanged + max(0, size - had))
            sample = torch.zeros(n, dtype=torch.bool)
            if wanted:
                sample[outside[torch.randint(len(outside), (size,), generator=generator)]] = True
            grown = largest(gradients, wanted, sample.view(active.shape))
            new = grown | largest(scores, size - int(grown.sum()), active)
            new = new | random(~(active | grown), size - int(new.sum()))
            return new, new
        if method == "mest":
            scores = scores + 0.01 * shown
        stay = largest(scores, min(size, had) - exchanged, active)
        missing = size - int(stay.sum())
        new = stay | (largest(gradients, missing, ~stay) if method == "rigl" else random(~stay, missing))
        return new, new

    def hold(self, chosen: dict):
        """Makes these the sets; state of what leaves B is gone, and its weight too where the method keeps none."""
        keeps = self.config.method in ("topkast", "topkast_random", "static", "static_random", "dpf")
        for name, layer in self.layers.items():
            stored = layer.backward_set.clone()
            layer.active.copy_(chosen[name][0]), layer.backward_set.copy_(chosen[name][1])
            if not keeps:
                layer.phi *= layer.backward_set
            for state in self.optimizer.state[layer.phi].values():
                if torch.is_tensor(state) and state.shape == layer.phi.shape:
                    state *= stored & layer.backward_set
            if isinstance(self.optimizer, AgedAdam) and self.steps:
                self.optimizer.enter(layer.phi, layer.backward_set & ~stored)

    # Training

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        self.optimizer.zero_grad()
        losses = []
        for tokens in micro_batches:
            loss = loss_of(self.model, tokens) / len(micro_batches)
            loss.backward()
            losses.append(loss.item())
        config = self.config
        with torch.no_grad():
            layers = self.layers.values()
            density = sum(int(layer.active.sum()) for layer in layers) / sum(layer.phi.numel() for layer in layers)
            before = {}
            for name, layer in self.layers.items():
                layer.gradient = layer.phi.grad.clone()
                factor = layer.active + (layer.backward_set & ~layer.active).to(layer.phi.dtype) / density
                layer.phi.grad *= layer.backward_set
                if config.penalty_mode == "coupled":
                    layer.phi.grad += config.penalty * factor * layer.phi
                else:
                    layer.phi *= 1 - self.optimizer.param_groups[-1]["lr"] * config.penalty * factor
                self.shown[name] = layer.phi.grad.clone()
                before[name] = layer.phi.clone()
            self.optimizer.step()
            self.steps += 1
            for name, layer in self.layers.items():
                scaled = before[name] + config.exploration_lr_scale * (layer.phi - before[name])
                layer.phi.copy_(torch.where(layer.backward_set & ~layer.active, scaled, layer.phi))
            if self.due(self.steps):
                self.hold(self.planned or self.choose(self.steps))
                self.planned = None
            if self.steps == self.moment(config.explore_until):
                self.hold({name: (layer.active.clone(),) * 2 for name, layer in self.layers.items()})
            lag = config.refresh_lag
            if lag and [self.due(self.steps + ahead) for ahead in range(1, lag + 1)] == [False] * (lag - 1) + [True]:
                self.planned = self.choose(self.steps + lag)
        return sum(losses)
