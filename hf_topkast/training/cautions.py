"""What a training is told before it begins, and when it has ended."""

from typing import Any

from transformers.utils import logging

from ..layers import TopKastLayer
from ..sets import SetPlan, Timetable


logger = logging.get_logger(__name__)


def warn_of_schedule(
    plan: SetPlan, layers: dict[str, TopKastLayer], timetable: Timetable, total_steps: int | None
) -> None:
    """
    Says where a density schedule does something else than it looks like: it does not end, has a single cut, or passes
    layers over.

    Args:
        plan ([`SetPlan`]): has the densities.
        layers (`dict[str, TopKastLayer]`): the sparse layers, by name.
        timetable ([`Timetable`]): has the schedule.
        total_steps (`int`, *optional*): optimizer steps of the training.
    """
    if timetable.density_window is None:
        return
    config, (begin, end) = plan.config, timetable.density_window
    if total_steps is not None and end > total_steps:
        logger.warning(
            f"schedule_end={config.schedule_end!r} lies after the last of {total_steps} steps, so this training does "
            f"not reach density={config.density}. Give an earlier schedule_end."
        )
    if timetable.next_refresh(begin) == end:
        logger.warning(
            f"With refresh_every={config.refresh_every} no refresh lies between step {begin}, where the density "
            f"schedule begins, and step {end}, where it ends: the density goes from {config.initial_density} to "
            f"{config.density} at once. Give a smaller refresh_every."
        )
    final = dict.fromkeys(layers, config.density) | plan.overrides
    frozen = [name for name, layer in layers.items() if not layer.values.requires_grad]
    whole = [name for name in frozen if layers[name].active_count == layers[name].numel and final[name] != 1]
    if whole:
        logger.warning(
            f"Layer '{whole[0]}' has density 1 and is frozen ({len(whole)} such layers), and a frozen layer keeps its "
            "sets: the density schedule passes it over. For adapters on a sparse model, sparsify without "
            "initial_density."
        )


def warn_of_restart(former: str) -> None:
    """
    Says that a controller begins its schedule anew.

    Args:
        former (`str`): what tells of a training before this one, a clause.
    """
    logger.warning(
        f"{former}, and this TopKastController starts its schedule (refreshes, explore_until) at step 0. To resume "
        "that training, load the optimizer's state and call controller.load_state_dict(state), where state is the "
        "former controller's state_dict(). To start a new one without this warning: "
        "controller.load_state_dict({'step': 0})."
    )


def warn_of_unfinished_schedule(timetable: Timetable, step: int, density: float) -> None:
    """
    Says of a training that has ended that the model it leaves behind is on the way of its density schedule.

    Args:
        timetable ([`Timetable`]): has the schedule.
        step (`int`): the one that the model is of.
        density (`float`): of the model.
    """
    logger.warning(
        f"The training ends with the model of step {step}, and its density schedule at step "
        f"{timetable.density_window[1]}: the model has density {density:.4g}, and not "
        f"density={timetable.config.density}. Early stopping and load_best_model_at_end prefer the denser models of a "
        "schedule: do without them, or let the schedule end before the first evaluation."
    )


def warn_of_other_moments(then: dict[str, Any] | None, now: dict[str, Any], step: int | None) -> None:
    """
    Says of a training that goes on that its schedules have other moments than before, as fractions of more steps.

    Args:
        then, now (`dict`): as [`Timetable.moments`] gives them, of the training before and of this one; `None` if it
            was not noted.
        step (`int`, *optional*): the one that it goes on from.
    """
    changes = [
        f"{what} {(then or {}).get(key)} then, {now[key]} now"
        for key, what in (
            ("exploration", "exploration ends at step"),
            ("exchanges", "exchanges end at step"),
            ("density", "the density falls in steps"),
        )
        if then and key in now and then.get(key) != now[key]
    ]
    if changes:
        logger.warning(
            f"The schedules of the training that goes on from step {step} begin or end at other steps than before: "
            f"{'; '.join(changes)}. What had ended may begin again. Fractions are of all steps, which another number "
            "of processes or epochs changes: give max_steps, or steps in the place of fractions."
        )
