"""What happens at which optimizer step: pure functions of the step."""

import math
from collections.abc import Callable

from ..config import TopKastConfig
from ..method import get_method


# The way that is left to the final density, by the share of the schedule that is left.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda left: left,
    "cubic": lambda left: left**3,  # gradual magnitude pruning (Zhu and Gupta 2017, equation 1)
    "cosine": lambda left: (1 - math.cos(math.pi * left)) / 2,
}


def next_refresh(step: int, refresh_every: int, schedule_end: int | None = None) -> int:
    """
    The first optimizer step after `step` at which A and B change.

    Args:
        step (`int`): optimizer steps taken.
        refresh_every (`int`): steps between two refreshes.
        schedule_end (`int`, *optional*): the last step of a density schedule, which has a refresh of its own.
    """
    regular = (step // refresh_every + 1) * refresh_every
    return regular if schedule_end is None or schedule_end <= step else min(regular, schedule_end)


def drop_share_at(step: int, config: TopKastConfig, until: int | None) -> float:
    """
    The share of A that a refresh after optimizer step `step` exchanges.

    Args:
        step (`int`): optimizer steps taken.
        config ([`TopKastConfig`]): the settings.
        until (`int`, *optional*): the step of the last exchange, see `update_until`.
    """
    if config.drop_share is None or until is None or step > until:
        return 0.0
    way = step / max(until, 1)
    if config.drop_decay == "constant":
        return config.drop_share
    if config.drop_decay == "staged":
        return config.drop_share if way <= 0.75 else config.drop_share / 2
    left = SHAPES["cosine"](1 - way)
    return config.drop_end + (config.drop_share - config.drop_end) * left


def resolve_step(name: str, config: TopKastConfig, total_steps: int | None) -> int | None:
    """
    The optimizer step that a field stands for: up to 1 it is a fraction of `total_steps`, above 1 a step.

    Args:
        name (`str`): the field: `"explore_until"`, `"update_until"`, `"schedule_begin"` or `"schedule_end"`.
        config ([`TopKastConfig`]): the settings.
        total_steps (`int`, *optional*): optimizer steps of the whole training.

    Returns:
        `int`, or `None` if the field is not set.

    Raises:
        ValueError: if a fraction is given but `total_steps` is not.
    """
    value = getattr(config, name)
    if value is None:
        return None
    if value > 1 or value == 0:
        return int(value)
    if total_steps is None:
        raise ValueError(
            f"{name}={value!r} is a fraction of training, but the number of steps is not known: "
            f"pass total_steps to TopKastController, or give {name} as a step."
        )
    return round(value * total_steps)


def density_window(config: TopKastConfig, total_steps: int | None) -> tuple[int, int] | None:
    """
    The steps between which the density changes, `None` if it does not.

    Raises:
        ValueError: if the schedule would not end after it begins, or a fraction is given without `total_steps`.
    """
    if config.initial_density is None:
        return None
    begin, end = (resolve_step(name, config, total_steps) for name in ("schedule_begin", "schedule_end"))
    if begin >= end:
        raise ValueError(
            f"schedule_begin={config.schedule_begin!r} is step {begin} and schedule_end={config.schedule_end!r} is "
            f"step {end} of {total_steps}: the density must have a step to change in. Give an earlier schedule_begin "
            "or a later schedule_end."
        )
    return begin, end


def way_left(step: int, config: TopKastConfig, window: tuple[int, int] | None) -> float:
    """
    The share of the way from the initial density to the final one that is left after optimizer step `step`.

    Args:
        step (`int`): optimizer steps taken.
        config ([`TopKastConfig`]): the settings.
        window (`tuple[int, int]`, *optional*): first and last step of the schedule, see [`density_window`].
    """
    if window is None:
        return 0.0
    begin, end = window
    return SHAPES[config.density_schedule](min(1.0, max(0.0, (end - step) / (end - begin))))


def scheduled_density(final: float, left: float, config: TopKastConfig) -> float:
    """The density of A with a share `left` of the way still to go to the density `final`, a layer's own or not."""
    return final if config.initial_density is None else config.initial_density * left + final * (1 - left)


def backward_density_of(density: float, config: TopKastConfig, exploring: bool) -> float:
    """
    The density of B beside that of A: in the ratio of the two settings, or everything where the method has it so; that
    of A after exploration.
    """
    if not exploring:
        return density
    if density == config.density or get_method(config.method).backward_ratio == math.inf:
        return config.backward_density
    return min(1.0, density * (config.backward_density / config.density))
