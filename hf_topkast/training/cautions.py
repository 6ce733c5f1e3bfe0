"""What a training is told before it begins."""

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
