"""What the controller must know of optimizers: which ones work, weight decay, and state that moves with its weight."""

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer


# Running means of squared gradients, under the names that torch and transformers give them.
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance", "sum"})

# Parts of class or module names, and why a weight's state cannot follow it when A and B change.
UNSUPPORTED = {
    "8bit": "its state is quantised in blocks of neighbouring weights",
    "4bit": "its state is quantised in blocks of neighbouring weights",
    "fp8": "its state is quantised in blocks of neighbouring weights",
    "bitsandbytes": "its state may be quantised in blocks of neighbouring weights",
    "muon": "it orthogonalises whole matrices, and a sparse layer's values are a vector",
    "galore": "it projects whole matrices, and a sparse layer's values are a vector",
    "apollo": "it projects whole matrices, and a sparse layer's values are a vector",
    "shampoo": "it preconditions whole matrices, and a sparse layer's values are a vector",
    "soap": "it preconditions whole matrices, and a sparse layer's values are a vector",
    "lomo": "it updates weights during the backward pass, before the step the controller hooks",
    "lbfgs": "its state is a history over all weights together",
    "sparseadam": "it takes sparse gradients only, and the gradients here are dense vectors",
}


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer inside Accelerate's wrapper, which owns the hooks and the state."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def check_optimizer(optimizer: Optimizer, values: dict[str, nn.Parameter]):
    """
    Refuses an optimizer that cannot train sparse layers.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        values (`dict[str, torch.nn.Parameter]`): the trainable values of the sparse layers, by layer name.

    Raises:
        ValueError: if its state cannot move with a weight, or if it does not hold some layer's values.
    """
    kind = type(optimizer)
    signature = f"{kind.__module__}.{kind.__qualname__}".lower()
    for part, reason in UNSUPPORTED.items():
        if part in signature:
            raise ValueError(
                f"The optimizer {kind.__name__} cannot train sparse layers: {reason}. Use SGD, Adam, AdamW, Adafactor "
                "or RMSprop."
            )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in values.items() if id(parameter) not in held]
    if missing:
        raise ValueError(
            f"The optimizer {kind.__name__} does not hold the values of layer '{missing[0]}' ({len(missing)} such "
            "layers). Make the optimizer after sparsify(model), from model.parameters()."
        )


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


def carry_state(state: dict, stored: torch.Size, sources: Tensor, new_state: str):
    """
    Moves one parameter's optimizer state with its weights, in place where the size stays.

    A weight that stays in B keeps its state bit by bit. One that enters gets a first moment of zero and, with
    `new_state="mean"`, the layer's mean second moment instead of zero.

    Args:
        state (`dict`): `optimizer.state[values]`.
        stored (`torch.Size`): shape of the values before the move.
        sources (`torch.Tensor`): int64, (|B|,): former slot of each new slot, -1 for a weight that enters.
        new_state (`str`): `"zero"` or `"mean"`.

    Raises:
        ValueError: if a state tensor is neither a scalar nor of the values' shape.
    """
    stays = sources >= 0
    slots = sources.clamp(min=0)
    for key, old in state.items():
        if not isinstance(old, Tensor) or old.ndim == 0:
            continue  # a step count, or what holds for the whole parameter
        if old.shape != stored:
            raise ValueError(
                f"The optimizer keeps a state '{key}' of shape {tuple(old.shape)} for values of shape "
                f"{tuple(stored)}: it cannot be moved when A and B change. Use SGD, Adam, AdamW, Adafactor or RMSprop."
            )
        fresh = old.mean() if new_state == "mean" and key in SECOND_MOMENTS else old.new_zeros(())
        moved = torch.where(stays, old[slots], fresh)
        if moved.shape == old.shape:
            old.copy_(moved)
        else:
            state[key] = moved
