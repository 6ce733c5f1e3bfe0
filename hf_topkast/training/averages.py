"""One model from several: the average of their weights, as model soups and averaged checkpoints are made."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from ..layers import TopKastLayer
from ..sets import SetPlan, check_finite
from ..surgery import sparse_info, sparse_layers, sparse_root
from .averaged_model import bare, layer_pairs, same_sets
from .borrowed import give_back


def average_models(models: Iterable[nn.Module], weights: Iterable[float] | None = None) -> nn.Module:
    """
    Averages sparse models of one kind, weight by weight: Σ wᵢ·θᵢ / Σ wᵢ.

    Dense parameters and floating-point buffers are averaged too; all else is the first model's. Norms of inputs, which
    `score="activation"` ranks with, become the root of the mean of their squares, by |wᵢ|. If all models have the same
    sets, so has the average. Else A and B are chosen anew from the averaged θ, as a refresh would, in the sizes
    that they have in the first model. Half-precision weights are summed in float32.

    Args:
        models (`Iterable[torch.nn.Module]`): one or more models; none of them changes. Of a generator's models only
            one is in memory at a time, beside the average and a float32 θ for the sums.
        weights (`Iterable[float]`, *optional*): one for each model, of any sum but 0; they are divided by it. Equal by
            default.

    Returns:
        `torch.nn.Module`: a new model, a copy of the first in dtypes and devices.

    Raises:
        ValueError: if there is no model, if one is not sparse or not like the first (other layers, shapes, block
            sizes, or norms of inputs in only one of the two), if there are more or fewer weights than models, if a
            weight or the average is NaN or infinite, if the weights' sum is 0, or if FSDP2 has sharded a model.
    """
    weights = None if weights is None else _checked_weights(weights)
    average, same, total, count = None, True, 0.0, 0
    shifts: dict[str, Tensor] = {}  # Σ wᵢ·(θᵢ − θ₀): equal models give themselves, bit by bit
    squares, mass = {}, 0.0  # the same of the squares of norms, Σ |wᵢ|·(sᵢ² − s₀²), and Σ |wᵢ|
    for model in models:  # not enumerate, which would keep a model while the next one is made
        model = bare(model)
        if next(sparse_layers(model), None) is None:
            raise ValueError(
                f"average_models: model {count} ({type(model).__name__}) has no sparse layer. Average dense models by "
                "their state dicts; to make it sparse call sparsify first."
            )
        if weights is not None and count == len(weights):
            raise ValueError(f"average_models: there are {count} weights and more models. Give one for each model.")
        weight = 1.0 if weights is None else weights[count]
        if average is None:
            average = copy.deepcopy(model)
            give_back(average, model)
        else:
            _check_alike(average, model, count)
            _add_shifts(shifts, average, model, weight)
            _add_squares(squares, average, model, abs(weight))
            same = same and all(same_sets(*pair) for pair in layer_pairs(average, model))
        total, mass, count = total + weight, mass + abs(weight), count + 1
        del model
    if average is None:
        raise ValueError("average_models: there is no model to average. (A generator can be read only once.)")
    if weights is not None and count < len(weights):
        raise ValueError(f"average_models: there are {len(weights)} weights and {count} models. Give one for each.")

    for name, layer in sparse_layers(average):  # before weights are ranked with them
        if name in squares:
            mean = layer.input_norms.double().square() + squares[name] / mass
            layer.input_norms.copy_(mean.clamp(min=0).sqrt())
    choose = _own_sets if same else _chooser(average)
    for key, number, layer in _numbers(average):
        if key in shifts:
            mean = (number + shifts.pop(key) / total).to(number.dtype)
            check_finite(mean, key)
            if layer is None:
                number.copy_(mean)
            else:
                layer.reassign(*choose(layer, mean), mean)
    return average


def _checked_weights(weights: Iterable[float]) -> list[float]:
    weights = [float(weight) for weight in weights]
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"average_models: weights={weights} are not allowed: each must be a finite number.")
    if abs(sum(weights)) <= 1e-9 * sum(map(abs, weights)):
        raise ValueError(f"average_models: weights={weights} are not allowed: they are divided by their sum, 0.")
    return weights


def _dense_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point parameters and buffers but those that sparse layers keep θ and their sets in, by name."""
    own = {id(t) for _, layer in sparse_layers(model) for t in (layer.values, *layer.buffers(recurse=False))}
    named = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor for name, tensor in named if tensor.is_floating_point() and id(tensor) not in own}


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor, TopKastLayer | None]]:
    """What is averaged, in the order of names: θ of each sparse layer, with the layer, and then all else."""
    for name, layer in sorted(sparse_layers(model), key=lambda named: named[0]):
        yield name, layer.theta(), layer
    for name, tensor in sorted(_dense_tensors(model).items()):
        yield name, tensor.detach(), None


def _check_alike(first: nn.Module, model: nn.Module, place: int) -> None:
    outlines = []
    for one in (first, model):
        layers = {
            name: (type(layer).__name__, layer.matrix_shape, layer.block_size, layer.row_stride != 1)
            for name, layer in sparse_layers(one)
        }
        normed = {f"{n}.input_norms": "there" for n, layer in sparse_layers(one) if layer.input_norms is not None}
        dense = {name: tuple(tensor.shape) for name, tensor in _dense_tensors(one).items()}
        outlines.append({**layers, **normed, **dense})
    for key in outlines[0] | outlines[1]:
        mine, theirs = (outline.get(key, "missing") for outline in outlines)
        if mine != theirs:
            raise ValueError(
                f"average_models: model {place} is not like the first: '{key}' is {theirs} in it and {mine} in the "
                "first (type, (out, in), block size, scatter_blocks; or shape). Only models of one architecture that "
                "were made sparse with the same target_modules, block_size, scatter_blocks and score can be averaged."
            )


def _add_shifts(shifts: dict[str, Tensor], first: nn.Module, model: nn.Module, weight: float) -> None:
    for (key, start, _), (_, number, _) in zip(_numbers(first), _numbers(model)):
        wide = torch.promote_types(start.dtype, torch.float32)
        start, number = start.to(wide), number.to(start.device, wide)
        if not torch.equal(start, number):  # equal ones may be infinite, as masks in buffers are
            shift = (number - start).mul_(weight)
            shifts[key] = shifts[key].add_(shift) if key in shifts else shift


def _add_squares(squares: dict[str, Tensor], first: nn.Module, model: nn.Module, weight: float) -> None:
    for (name, mine), (_, theirs) in zip(sparse_layers(first), sparse_layers(model)):
        if mine.input_norms is None:
            continue
        start, other = mine.input_norms.double(), theirs.input_norms.to(mine.input_norms.device).double()
        if not torch.equal(start, other):
            squares[name] = squares.get(name, 0.0) + weight * (other.square() - start.square())


def _own_sets(layer: TopKastLayer, theta: Tensor) -> tuple[Tensor, Tensor]:
    return layer.pattern.active_mask(), layer.pattern.backward_mask()


def _chooser(model: nn.Module) -> Callable[[TopKastLayer, Tensor], tuple[Tensor, Tensor]]:
    """Chooses a layer's sets from its θ as a refresh does, part by part, in the sizes of those that it has."""
    root = sparse_root(model)
    names = {layer: name for name, layer in sparse_layers(root)}
    plan = SetPlan(root, {name: layer.matrix_shape for layer, name in names.items()}, sparse_info(model).config)

    def choose(layer: TopKastLayer, theta: Tensor) -> tuple[Tensor, Tensor]:
        name = names[layer]
        sizes, scores = plan.present_sizes(name, layer.row_offsets), layer.scored(theta).chunk(layer.matrices)
        pairs = [plan.largest(name, own, sizes, place) for place, own in enumerate(scores)]
        active, backward = map(torch.cat, zip(*pairs))
        return active, backward

    return choose
