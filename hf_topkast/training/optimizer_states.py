"""
Which optimizers keep one number per weight, and what those numbers start at: a registry, by class.

That cannot be told of an optimizer in general, hence a list, which [`register_optimizer`] makes longer.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


# What a newcomer's state starts at: a number, or a function of its parameter group and the newcomers' values, (k,),
# that gives a number or (k,).
Start = float | Callable[[dict[str, Any], Tensor], float | Tensor]

# Running means (or sums, or maxima) of squared gradients, under the names that most optimizers give them.
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance")


@dataclass(frozen=True)
class StateRule:
    """
    What is known of an optimizer whose per-weight state has the weight's shape.

    Attributes:
        fresh (`dict`): what a newcomer's state starts at, by state name; zero where it is not named.
        second_moments (`tuple[str, ...]`): the states that `new_state="mean"` fills with the layer's mean.
        mirrors_values (`bool`): whether a state is another version of the weights, which only holds as long as nothing
            but the optimizer changes them.
        corrects_bias (`bool`): whether it is Adam, whose correction of young moments `new_state="fresh"` makes one of
            each weight.
    """

    fresh: Mapping[str, Start] = field(default_factory=dict)
    second_moments: tuple[str, ...] = SECOND_MOMENTS
    mirrors_values: bool = False
    corrects_bias: bool = False


def _own_values(group: dict[str, Any], values: Tensor) -> Tensor:
    return values


def _learning_rate(group: dict[str, Any], values: Tensor) -> float:
    return float(group["lr"])


def _initial_accumulator(group: dict[str, Any], values: Tensor) -> float:
    return group["initial_accumulator_value"]


_FROM_ZERO = StateRule()
# The parameter is y, which lies between z, where steps are taken, and x, their average, which is not stored but
# follows from both. A newcomer has z = y, so x is the same, as when its training begins.
_SCHEDULE_FREE = StateRule({"z": _own_values}, mirrors_values=True)

# By package and class, so that nothing is imported for a package that is not there.
_KNOWN: dict[str, StateRule] = {
    **dict.fromkeys(("torch.Adam", "torch.AdamW"), StateRule(corrects_bias=True)),
    **dict.fromkeys(("torch.SGD", "torch.NAdam", "torch.RAdam"), _FROM_ZERO),
    **dict.fromkeys(("torch.RMSprop", "torch.Adafactor"), _FROM_ZERO),
    "torch.Adagrad": StateRule({"sum": _initial_accumulator}, second_moments=("sum",)),
    # Its step is the ratio of two means: with one of them fresh and the other not it would be neither.
    "torch.Adadelta": StateRule(second_moments=("square_avg", "acc_delta")),
    "torch.Adamax": StateRule(second_moments=("exp_inf",)),
    "torch.Rprop": StateRule({"step_size": _learning_rate}, second_moments=()),
    "torch.ASGD": StateRule({"ax": _own_values}, second_moments=(), mirrors_values=True),
    "transformers.Adafactor": _FROM_ZERO,
    "lion_pytorch.Lion": _FROM_ZERO,
    **dict.fromkeys(("optimi.SGD", "optimi.Adam", "optimi.AdamW", "optimi.RAdam"), _FROM_ZERO),
    **dict.fromkeys(("optimi.StableAdamW", "optimi.Lion"), _FROM_ZERO),
    "optimi.Ranger": StateRule({"la_param": _own_values}, mirrors_values=True),
    "schedulefree.AdamWScheduleFree": _SCHEDULE_FREE,
    "schedulefree.RAdamScheduleFree": _SCHEDULE_FREE,
    "schedulefree.SGDScheduleFree": _SCHEDULE_FREE,
}

_REGISTERED: dict[type[Optimizer], StateRule] = {}


def register_optimizer(
    kind: type[Optimizer],
    fresh: Mapping[str, Start] | None = None,
    second_moments: Iterable[str] = SECOND_MOMENTS,
    mirrors_values: bool = False,
) -> None:
    """
    Allows an optimizer class, and its subclasses, for sparse layers.

    Its state must be one number per weight: every tensor in `optimizer.state[parameter]` has the parameter's shape, or
    is a single number for all of it. When A and B change, a weight that stays in B keeps its state, and one that
    enters gets fresh state. Registering a class again replaces what was said before.

    Args:
        kind (`type[torch.optim.Optimizer]`): the class.
        fresh (`dict`, *optional*): what the state of an entering weight starts at, by state name; zero for those not
            named. A number, or a function of the parameter group and the entering weights' values, (k,), that gives a
            number or a tensor (k,); of a stack of experts it is given those of one expert at a time.
        second_moments (`Iterable[str]`, *optional*): the states that `new_state="mean"` fills with the layer's mean
            instead. Defaults to the names that torch's Adam, RMSprop and Adafactor use.
        mirrors_values (`bool`, *optional*, defaults to `False`): whether a state is another version of the weights,
            such as their running average. `exploration_lr_scale` and `penalty_mode="decoupled"`, which change values
            outside the optimizer's step, are refused then.

    Raises:
        ValueError: if `kind` is no optimizer class, or LBFGS, or if a start is neither a number nor a function.

    Example:

    ```python
    register_optimizer(MyAdagrad, fresh={"sum": 0.1}, second_moments=["sum"])
    register_optimizer(MyAveragingSGD, fresh={"average": lambda group, values: values}, mirrors_values=True)
    ```
    """
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ValueError(f"register_optimizer needs a subclass of torch.optim.Optimizer, got {kind!r}.")
    if issubclass(kind, torch.optim.LBFGS):
        raise ValueError(
            f"{kind.__name__} keeps a history of all weights together, which cannot move with single weights. Use an "
            "optimizer whose state is one number per weight."
        )
    fresh = dict(fresh or {})
    for name, start in fresh.items():
        number = isinstance(start, int | float) and not isinstance(start, bool) and math.isfinite(start)
        if not (number or callable(start)):
            raise ValueError(
                f"fresh[{name!r}] of {kind.__name__} must be a finite number, or a function of the parameter group "
                f"and the newcomers' values, got {start!r}."
            )
    _REGISTERED[kind] = StateRule(fresh, tuple(second_moments), mirrors_values)


def state_rule(kind: type) -> StateRule | None:
    """What is known of an optimizer class, from itself or the nearest class it derives from; `None` if nothing is."""
    for base in kind.__mro__:
        rule = _REGISTERED.get(base) or _KNOWN.get(f"{base.__module__.partition('.')[0]}.{base.__name__}")
        if rule is not None:
            return rule
    return None


def supported_optimizers() -> str:
    """The classes that are known, for messages: `SGD, Adam (torch), Lion (lion_pytorch), ...`."""
    packages: dict[str, list[str]] = {}
    known = [*_KNOWN, *(f"{kind.__module__}.{kind.__qualname__}" for kind in _REGISTERED)]
    for package, _, name in (entry.rpartition(".") for entry in known):
        packages.setdefault(package, []).append(name)
    return ", ".join(f"{', '.join(names)} ({package})" for package, names in packages.items())
