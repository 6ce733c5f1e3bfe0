"""How large the inputs of each layer are on a user's data: what a score of weights by their effect needs."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import ExpertStack, GroupedLinear, is_decorated, put_layer, put_parameter
from ..storage import ExpertSquares, InputSquares


@torch.no_grad()
def input_norms(
    model: nn.Module, layers: Mapping[str, nn.Module | ExpertStack], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """
    Root mean square of every input feature of some layers, over all tokens of some batches; of an expert over those
    that come to it.

    Runs the model forward in evaluation mode, without gradients; of each layer, or expert, it keeps in_features
    numbers. Tokens that a batch's `attention_mask` leaves out do not count.

    Args:
        model (`torch.nn.Module`): the model.
        layers (`Mapping[str, torch.nn.Module | ExpertStack]`): the layers, by name.
        batches (`Iterable`): inputs of the model, each a mapping of its arguments (as a tokenizer gives) or a tensor
            of token ids, (batch, tokens). A few thousand tokens are enough.

    Returns:
        `dict[str, torch.Tensor]`: float32, (in_features,), or (experts, in_features), by the layer's name.

    Raises:
        ValueError: if there is no batch, if one does not fit the model, or if a layer or an expert got no input; the
            message says which.
    """
    squares = {
        name: (ExpertSquares if isinstance(layer, ExpertStack) else InputSquares)(layer.weight.device)
        for name, layer in layers.items()
    }
    count = run_batches(model, layers, batches, lambda name, *inputs: squares[name].add(*inputs))
    if not count:
        raise ValueError("calibration has no batch: give a few inputs of the model, such as those of its training.")
    unseen = [name for name, seen in squares.items() if not seen.tokens]
    if unseen:
        raise ValueError(
            f"calibration: layer '{unseen[0]}' got no input from {count} batches ({len(unseen)} such layers), so its "
            "weights cannot be scored. Give more or other batches, or name it in exclude_modules."
        )
    _check_every_expert(layers, squares, count)
    norms = {name: seen.mean().sqrt() for name, seen in squares.items()}
    broken = [name for name, norm in norms.items() if not bool(norm.isfinite().all())]
    if broken:
        raise ValueError(
            f"calibration: inputs of layer '{broken[0]}' are NaN or infinite ({len(broken)} such layers), so its "
            "weights cannot be scored. Load the model in float32 or bfloat16, and look at the batches."
        )
    return {name: _without_zeros(norm) for name, norm in norms.items()}


def _check_every_expert(layers: Mapping[str, nn.Module | ExpertStack], squares: dict[str, Any], count: int):
    never = [
        (name, expert)
        for name, layer in layers.items()
        if isinstance(layer, ExpertStack)
        for expert in (~squares[name].seen()[: layer.experts - layer.unused]).nonzero().flatten().tolist()
    ]
    if never:
        name, expert = never[0]
        raise ValueError(
            f"calibration: expert {expert} of '{name}' was chosen for no token of {count} batches ({len(never)} such "
            "experts), so its weights cannot be scored. Give more or other batches, or name the experts in "
            "exclude_modules."
        )


@torch.no_grad()
def run_batches(
    model: nn.Module,
    layers: Mapping[str, nn.Module | ExpertStack],
    batches: Iterable[Any],
    see: Callable[..., None],
    stop_early: bool = False,
) -> int:
    """
    Runs a model in evaluation mode, and shows the inputs of some layers, (tokens, in), without padding; of experts
    sorted by expert.

    Args:
        model (`torch.nn.Module`): the model.
        layers (`Mapping[str, torch.nn.Module | ExpertStack]`): the layers, by name.
        batches (`Iterable`): as [`input_norms`] says.
        see (`Callable`): gets a layer's name and its input, and for experts where the rows of each end, (experts,).
        stop_early (`bool`, *optional*, defaults to `False`): whether a batch ends once all layers have seen it.

    Returns:
        `int`: the number of batches.

    Raises:
        ValueError: if a batch does not fit the model.
    """
    mask: Tensor | None = None
    missing: set[str] = set()

    def hook_of(name: str):
        def hook(module, args, kwargs):
            if isinstance(module, GroupedLinear):
                see(name, *args[:2])
                return
            see(name, _without_padding(args[0] if args else kwargs["input"], mask))

        return hook

    def after(name: str):
        def hook(module, args, output):
            missing.discard(name)
            if stop_early and not missing:
                raise _Seen

        return hook

    def hide_padding(owner, args):
        # Past the last expert, where it comes to nothing; experts get tokens in an order of their own.
        if mask is None or len(args) < 2 or len(args[1]) != mask.numel():
            return args
        outside = ~mask.flatten().to(args[1].device)
        return args[0], args[1].masked_fill(outside[:, None], owner.down_proj.shape[0]), *args[2:]

    stacks = {name: layer for name, layer in layers.items() if isinstance(layer, ExpertStack)}
    parameters = {name: stack.weight for name, stack in stacks.items()}
    modes = {module: module.training for module in model.modules()}
    hooks, count = [], 0
    try:
        layers = {name: GroupedLinear(layer) if name in stacks else layer for name, layer in layers.items()}
        for name, stack in stacks.items():
            put_layer(stack.owner, stack.key, layers[name])
        owners = {id(stack.owner): stack.owner for stack in stacks.values() if is_decorated(stack.owner)}
        hooks += [owner.register_forward_pre_hook(hide_padding) for owner in owners.values()]
        hooks += [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
        hooks += [layer.register_forward_hook(after(name)) for name, layer in layers.items()]
        model.eval()
        device = next(model.parameters()).device
        for count, batch in enumerate([batches] if isinstance(batches, Mapping | Tensor) else batches, start=1):
            given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = given.bool() if isinstance(given, Tensor) else None
            missing.update(layers)
            with contextlib.suppress(_Seen):
                _run(model, batch, count, device)
    finally:
        for hook in hooks:
            hook.remove()
        for name, stack in stacks.items():
            put_parameter(stack.owner, stack.key, parameters[name])
        for module, mode in modes.items():
            module.training = mode
    return count


class _Seen(Exception):
    """All layers have seen the batch."""


def _without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of `x` that are tokens by a mask, (batch, tokens); all of it, if it has other rows than the mask."""
    if mask is None:
        return x
    sizes, own = ([size for size in shape if size != 1] for shape in (x.shape[:-1], mask.shape))
    if sizes not in (own, [mask.numel()]):  # some models flatten tokens, others give them a dimension more
        return x
    return x.flatten(0, -2)[mask.flatten().to(x.device)]


def _without_zeros(norms: Tensor) -> Tensor:
    """Features that were never active count a millionth of the mean, so that their weights have an order too."""
    least = norms.mean(-1, keepdim=True) * 1e-6
    return norms.clamp(min=torch.where(least > 0, least, 1))  # 1 for all of an expert that nothing can come to


def _run(model: nn.Module, batch: Any, number: int, device: torch.device):
    try:
        if isinstance(batch, Mapping):
            model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
        else:
            model(batch.to(device))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"calibration: batch {number} does not fit {type(model).__name__} ({type(error).__name__}: {error}). Give "
            "token ids, (batch, tokens), or mappings of the model's arguments, as its tokenizer makes them with "
            "return_tensors='pt'."
        ) from error
