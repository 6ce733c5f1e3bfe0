"""What the controller must know of optimizers: which ones work, weight decay, and state that moves with its weight."""

from collections.abc import Iterable
from functools import partial

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import TopKastConfig
from ..storage import Change, full, is_sharded, shard_like
from .cold_start import ENTERED, check_fresh
from .optimizer_states import Start, state_rule, supported_optimizers


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside Accelerate's wrapper, which owns the hooks and the state."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def check_optimizer(optimizer: Optimizer, values: dict[str, nn.Parameter], config: TopKastConfig):
    """
    Refuses an optimizer that cannot train sparse layers.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        values (`dict[str, torch.nn.Parameter]`): the trainable values of the sparse layers, by layer name.
        config ([`TopKastConfig`]): the settings; some need a learning rate, or Adam.

    Raises:
        ValueError: if its state may not move with a weight, if it steps inside the backward pass, if it does not hold
            some layer's values, if it keeps a state of another shape for them, or if it has no learning rate for a
            decoupled penalty.
    """
    kind = type(optimizer)
    if state_rule(kind) is None:
        raise ValueError(
            f"The optimizer {kind.__name__} ({kind.__module__}) cannot train sparse layers: its state is not known to "
            "be one number per weight that can move with its weight when A and B change, as 8-bit and matrix-wise "
            f"optimizers show. Use one of {supported_optimizers()}, or a subclass. If its state is one number per "
            f"weight, say what it starts at: hf_topkast.register_optimizer({kind.__name__}, fresh=...)."
        )
    if any(group.get("gradient_release") for group in optimizer.param_groups):
        raise ValueError(
            f"{kind.__name__} with gradient_release=True takes its steps inside the backward pass, one parameter at a "
            "time, where neither the exploration penalty nor a refresh has a place. Set gradient_release=False."
        )
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in values.items() if id(parameter) not in groups]
    if missing:
        raise ValueError(
            f"The optimizer {kind.__name__} does not hold the values of layer '{missing[0]}' ({len(missing)} such "
            "layers). Make the optimizer after sparsify(model), from model.parameters()."
        )
    for name, parameter in values.items():
        check_state(optimizer, name, parameter)
        needs_rate = {
            f"lr_scale={config.lr_scale}": config.lr_scale != 1,
            "penalty_mode='decoupled'": config.penalty_mode == "decoupled",
        }
        setting = next((setting for setting, needed in needs_rate.items() if needed), None)
        if setting is not None and groups[id(parameter)]["lr"] is None:
            raise ValueError(
                f"{setting} goes by the learning rate, and {kind.__name__} has none (lr=None). Leave it out, or give "
                "it a learning rate."
            )
    if config.new_state == "fresh":
        check_fresh(optimizer, values)


def check_outside_changes(optimizer: Optimizer, config: TopKastConfig):
    """
    Refuses settings that change values in another way than the optimizer, where it would have to know of it.

    Schedule-free optimizers, for one, do not store the average x that they evaluate: it follows from the parameter, y,
    and the state z. Were y alone scaled or shrunk, x would move the other way, or by more than y.

    Raises:
        ValueError: if the optimizer keeps another version of the weights and a setting changes the values alone.
    """
    rule = state_rule(type(optimizer))
    if rule is None or not rule.mirrors_values:
        return
    decoupled = config.penalty_mode == "decoupled" and config.penalty != 0
    scales = [name for name in ("exploration_lr_scale", "lr_scale", "powerprop_alpha") if getattr(config, name) != 1]
    for changes, setting, way_out in (
        *((True, f"{name}={getattr(config, name)}", "Leave it at 1.0") for name in scales),
        (decoupled, "penalty_mode='decoupled'", "Use penalty_mode='coupled'"),
    ):
        if changes:
            raise ValueError(
                f"{setting} changes values in another way than the optimizer, and {type(optimizer).__name__} keeps "
                f"another version of them in its state, which would not fit any more. {way_out}, or use another one."
            )


def check_state(optimizer: Optimizer, name: str, values: nn.Parameter):
    """
    Refuses optimizer state that does not belong to a layer's values as they are.

    Raises:
        ValueError: if a state is a collection, or a tensor that is neither a single number nor of the values' shape,
            or if a state that is registered is not there; the message names layer and state.
    """
    kind, held = type(optimizer).__name__, optimizer.state.get(values, {})
    for key, state in held.items():
        if isinstance(state, list | tuple | dict):
            raise ValueError(
                f"Layer '{name}': {kind} keeps a {type(state).__name__} as state '{key}', which cannot move with its "
                "weights. Use an optimizer whose state is one number per weight."
            )
        if isinstance(state, Tensor) and state.numel() != 1 and state.shape != values.shape:
            raise ValueError(
                f"Layer '{name}': {kind} keeps a state '{key}' of shape {tuple(state.shape)} for values of shape "
                f"{tuple(values.shape)}. Load the optimizer state that was saved with these weights, or start with a "
                "new optimizer."
            )
    rule = state_rule(type(optimizer))
    absent = [key for key in rule.fresh if key not in held] if held and rule is not None else []
    if absent:
        raise ValueError(
            f"Layer '{name}': {kind} keeps no state '{absent[0]}', whose start is registered; it keeps "
            f"{', '.join(map(repr, held))}. Name its states in register_optimizer as it does."
        )


def holds_state(optimizer: Optimizer, values: Iterable[nn.Parameter]) -> bool:
    """Whether the optimizer has stepped any of these values, or state of such steps was loaded."""
    held = (optimizer.state.get(parameter) for parameter in values)
    return any(state and float(state.get("step", 1)) > 0 for state in held)  # Adagrad begins with one, of no step


def whole_state(optimizer: Optimizer, keep: bool = True) -> dict:
    """
    `optimizer.state_dict()` as one process would have it, on the CPU, gathered tensor by tensor from sharded ones.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer; every rank has to call.
        keep (`bool`, *optional*, defaults to `True`): whether this rank wants the tensors.
    """
    whole = optimizer.state_dict()
    for index, state in whole["state"].items():
        gathered = {}
        for key, value in state.items():
            value = full(value)
            if keep:
                gathered[key] = value.cpu() if isinstance(value, Tensor) else value
        whole["state"][index] = gathered
    return whole


def load_whole_state(optimizer: Optimizer, whole: dict):
    """
    Loads what [`whole_state`] gave, or the optimizer of one process, into one whose parameters may be sharded.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        whole (`dict`): the state, the same on every rank.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            key: shard_like(value, parameters[index]) if _belongs_to_shards(value, parameters[index]) else value
            for key, value in entries.items()
        }
        for index, entries in whole["state"].items()
    }
    optimizer.load_state_dict({**whole, "state": state})


def _belongs_to_shards(value, parameter: nn.Parameter) -> bool:
    return is_sharded(parameter) and isinstance(value, Tensor) and value.shape == parameter.shape


def carry_state(optimizer: Optimizer, change: Change, new_state: str, lr_scale: float = 1.0):
    """
    Has the optimizer's state of a layer's values move with its weights, in place where the size stays.

    A weight that stays in B keeps its state bit by bit. One that enters gets what the state of this kind of optimizer
    starts at or, with `new_state="mean"`, the layer's mean second moment. State of another size than the values is of
    the whole parameter and stays.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        change ([`Change`]): the layer's, before any matrix has other sets.
        new_state (`str`): as in [`TopKastConfig`].
        lr_scale (`float`, *optional*, defaults to 1.0): factor on the learning rate that a state may start at.
    """
    values = change.layer.values
    state = optimizer.state.get(values)
    if not state:
        return
    rule = state_rule(type(optimizer))
    group = next(group for group in optimizer.param_groups if any(held is values for held in group["params"]))
    if lr_scale != 1:
        group = {**group, "lr": group["lr"] * lr_scale}
    for key, stored in state.items():
        if not isinstance(stored, Tensor) or stored.ndim == 0 or stored.numel() != values.numel():
            continue  # a step count, or what holds for the whole parameter
        if new_state == "mean" and key in rule.second_moments:
            start = partial(_always, full(stored).mean())
        elif key == ENTERED:
            start = partial(_always, torch.as_tensor(state["step"]))
        else:
            start = partial(_start, rule.fresh.get(key, 0.0), key, group)
        change.carry(stored, start, partial(state.__setitem__, key))


def _always(number: Tensor, sources: Tensor, values: Tensor) -> Tensor:
    return number


def _start(start: Start, key: str, group: dict, sources: Tensor, values: Tensor) -> Tensor:
    """What the state `key` of newcomers begins with: one number for all, or one for each, in its slot."""
    if callable(start):
        stays = sources >= 0
        newcomers = values[~stays]
        start = start(group, newcomers)
    if not isinstance(start, Tensor) or start.ndim == 0:
        return torch.tensor(float(start), dtype=torch.float64)
    if start.shape != newcomers.shape:
        raise ValueError(
            f"The start registered for the optimizer's state '{key}' has shape {tuple(start.shape)}, where "
            f"{tuple(newcomers.shape)} weights enter B. Give register_optimizer a function that returns a number, or "
            "one for each of the values it is given."
        )
    return start.new_zeros(stays.shape).masked_scatter(~stays, start)
