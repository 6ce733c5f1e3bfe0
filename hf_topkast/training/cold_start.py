"""
Adam's cold start, and its cure: `new_state="fresh"`.

A weight that enters B has moments of zero, while Adam's step count, which says how far moments are from what they
estimate, is that of the whole parameter. Late in training its first change is (1 − β1) / √(1 − β2) times the learning
rate, 3.16 of it with β2 = 0.999, whatever its gradient. So the count of steps from its own entry is kept for each
weight, and the change made what Adam would have made of it (as SMET does, arXiv 2606.00888, with a warm-up).
"""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..storage import local
from .optimizer_states import state_rule


# The optimizer's step count when a weight entered B, in the optimizer's state beside its moments.
ENTERED = "entered"


def check_fresh(optimizer: Optimizer, values: dict[str, nn.Parameter]):
    """
    Refuses what `new_state="fresh"` is not defined for.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        values (`dict[str, torch.nn.Parameter]`): the trainable values of the sparse layers, by layer name.

    Raises:
        ValueError: if the optimizer does not correct its moments as Adam does, or if values are in half precision, in
            which a loaded state could not count.
    """
    kind = type(optimizer)
    rule = state_rule(kind)
    if rule is not None and not rule.corrects_bias:
        raise ValueError(
            f"new_state='fresh' counts Adam's bias correction from each weight's own entry, and {kind.__name__} "
            "corrects its moments in another way or not at all. Use new_state='zero', or torch's Adam or AdamW."
        )
    for name, parameter in values.items():
        if parameter.dtype.itemsize < 4:
            raise ValueError(
                f"new_state='fresh' keeps a step count for each weight, which {parameter.dtype}, the dtype of the "
                f"values of layer '{name}', cannot hold once it is loaded. Keep the weights in float32 (under "
                "autocast, as bf16=True does), or use new_state='zero'."
            )


def note_start(state: dict, values: Tensor):
    """After a step: gives a parameter's state, if it has one, the step counts, 0 for weights there from the start."""
    if state and ENTERED not in state:
        state[ENTERED] = torch.zeros_like(values)  # of the values' dtype, to which a loaded state is cast


def correct_changes(values: Tensor, state: dict, group: dict, warmup: int):
    """
    Makes the step that Adam has just taken, in place, the one with a step count for each weight.

    With a the steps since a weight entered and t those of the parameter, its change is lr·m̂ₐ / (√v̂ₐ + ε) in the place
    of lr·m̂ₜ / (√v̂ₜ + ε), where m̂ and v̂ are corrected with a or t; times min(1, a / `warmup`).

    Args:
        values (`torch.Tensor`): (|B|,), after the step, sharded or not.
        state (`dict`): the optimizer's state of them, with [`note_start`]'s entry.
        group (`dict`): the parameter group that the step was taken with.
        warmup (`int`): steps over which the change rises to full; 0 for none.
    """
    if not state:
        return
    entered = local(state[ENTERED])
    if not bool(entered.any()):
        return  # all of one age: that of the parameter
    moment = local(state["exp_avg"])
    root = local(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]).sqrt()
    steps = torch.as_tensor(state["step"], dtype=values.dtype, device=moment.device)
    age = steps - entered

    def change(count: Tensor) -> Tensor:
        first, second = (_distance(beta, count) for beta in group["betas"])
        return moment / first / (root / second.sqrt() + group["eps"])

    wanted = change(age)
    if warmup:
        wanted *= torch.where(entered > 0, (age / warmup).clamp(max=1), 1)
    # Adam negates gradients with `maximize`, not changes: the moments have the sign already.
    local(values).sub_((wanted - change(steps)) * group["lr"])


def _distance(beta: float | Tensor, count: Tensor) -> Tensor:
    """1 − βᵗ, without the rounding of βᵗ."""
    beta = float(beta)
    return torch.ones_like(count) if beta == 0 else -torch.expm1(count * math.log(beta))
