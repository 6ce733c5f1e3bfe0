"""What the controller must know of optimizers: which ones work, weight decay, and state that moves with its weight."""

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

from ..storage import full, is_sharded, local, part_of, shard_like


# Their per-weight state is a vector of the weight's shape that starts at zero, so it can move, be dropped and start
# afresh with its weight. That cannot be told of an optimizer in general, hence a list.
SUPPORTED = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adafactor,
    torch.optim.RMSprop,
    Adafactor,
)

# Running means of squared gradients, under the names that torch and transformers give them.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance"})


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside Accelerate's wrapper, which owns the hooks and the state."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def check_optimizer(optimizer: Optimizer, values: dict[str, nn.Parameter], penalty_mode: str):
    """
    Refuses an optimizer that cannot train sparse layers.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        values (`dict[str, torch.nn.Parameter]`): the trainable values of the sparse layers, by layer name.
        penalty_mode (`str`): as in [`TopKastConfig`]; `"decoupled"` needs a learning rate.

    Raises:
        ValueError: if its state may not move with a weight, if it does not hold some layer's values, if it keeps a
            state of another shape for them, or if it has no learning rate for a decoupled penalty.
    """
    kind = type(optimizer)
    if not isinstance(optimizer, SUPPORTED):
        names = ", ".join(dict.fromkeys(supported.__name__ for supported in SUPPORTED))
        raise ValueError(
            f"The optimizer {kind.__name__} ({kind.__module__}) cannot train sparse layers: its state is not known to "
            "be one number per weight that can move with its weight when A and B change, as 8-bit and matrix-wise "
            f"optimizers show. Use one of {names}, or a subclass."
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
        if penalty_mode == "decoupled" and groups[id(parameter)]["lr"] is None:
            raise ValueError(
                f"penalty_mode='decoupled' shrinks values in proportion to the learning rate, and {kind.__name__} has "
                "none (lr=None). Use penalty_mode='coupled', or give it a learning rate."
            )


def check_state(optimizer: Optimizer, name: str, values: nn.Parameter):
    """
    Refuses optimizer state that does not belong to a layer's values as they are.

    Raises:
        ValueError: if a state tensor is neither a scalar nor of the values' shape; the message names layer and state.
    """
    for key, state in optimizer.state.get(values, {}).items():
        if isinstance(state, Tensor) and state.ndim and state.shape != values.shape:
            raise ValueError(
                f"Layer '{name}': {type(optimizer).__name__} keeps a state '{key}' of shape {tuple(state.shape)} for "
                f"values of shape {tuple(values.shape)}. Load the optimizer state that was saved with these weights, "
                "or start with a new optimizer."
            )


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


def exclude_from_weight_decay(optimizer: Optimizer, values: dict[str, nn.Parameter]):
    """
    Moves the values of sparse layers into parameter groups without weight decay.

    Raises:
        ValueError: if a scheduler already keeps a learning rate for each group, so that groups cannot be split.
    """
    sparse = {id(parameter) for parameter in values.values()}
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in sparse]
        if not chosen or not group.get("weight_decay"):
            continue
        if len(chosen) == len(group["params"]):
            group["weight_decay"] = 0.0
            continue
        if "initial_lr" in group:
            raise ValueError(
                "The optimizer decays sparse values together with other weights, and a learning rate scheduler is "
                "attached already. Make the TopKastController before the scheduler, use TopKastTrainer, or give the "
                "parameters named '*.values' a group of their own with weight_decay=0."
            )
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in sparse]
        optimizer.add_param_group({**group, "params": chosen, "weight_decay": 0.0})


def carry_state(state: dict, sources: Tensor, new_state: str):
    """
    Moves one parameter's optimizer state with its weights, in place where the size stays.

    A weight that stays in B keeps its state bit by bit. One that enters gets a first moment of zero and, with
    `new_state="mean"`, the layer's mean second moment instead of zero.

    Args:
        state (`dict`): `optimizer.state[values]`, of which every tensor but scalars has the values' former shape.
        sources (`torch.Tensor`): int64, (|B|,): former slot of each new slot, -1 for a weight that enters.
        new_state (`str`): `"zero"` or `"mean"`.
    """
    stays = sources >= 0
    slots = sources.clamp(min=0)
    for key, stored in state.items():
        if not isinstance(stored, Tensor) or stored.ndim == 0:
            continue  # a step count, or what holds for the whole parameter
        old = full(stored)
        fresh = old.mean() if new_state == "mean" and key in SECOND_MOMENTS else old.new_zeros(())
        moved = torch.where(stays, old[slots], fresh)
        if moved.shape == old.shape:
            local(stored).copy_(part_of(moved, stored))
        else:
            state[key] = moved
