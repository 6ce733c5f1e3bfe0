"""What happens at which optimizer step: pure functions of the step."""

from .config import TopKastConfig


def refresh_due(step: int, refresh_every: int) -> bool:
    """Whether A and B are chosen again after optimizer step `step` (counted from 1)."""
    return step > 0 and step % refresh_every == 0


def exploration_end(explore_until: int | float | None, total_steps: int | None) -> int | None:
    """
    Optimizer step after which B becomes A, `None` if exploration never ends.

    Args:
        explore_until (`int` or `float`, *optional*): up to 1 a fraction of `total_steps`, above 1 a step.
        total_steps (`int`, *optional*): optimizer steps of the whole training.

    Raises:
        ValueError: if a fraction is given but `total_steps` is not.
    """
    if explore_until is None:
        return None
    if explore_until > 1 or explore_until == 0:
        return int(explore_until)
    if total_steps is None:
        raise ValueError(
            f"explore_until={explore_until!r} is a fraction of training, but the number of steps is not known: "
            "pass total_steps to TopKastController, or give explore_until as a step."
        )
    return round(explore_until * total_steps)


def backward_density_at(step: int, config: TopKastConfig, exploration_end_step: int | None) -> float:
    """Density of B after optimizer step `step`: that of A once exploration has ended."""
    ended = exploration_end_step is not None and step >= exploration_end_step
    return config.density if ended else config.backward_density
