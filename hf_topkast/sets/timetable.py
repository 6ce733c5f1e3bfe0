"""When the sets of one training change: the schedules of a configuration, with its fractions as steps."""

from dataclasses import dataclass
from typing import Any

from ..checks import check, plain, whole
from ..config import TopKastConfig
from ..method import get_method
from .schedule import density_window, drop_share_at, next_refresh, resolve_step, way_left


@dataclass(frozen=True)
class Timetable:
    """
    What happens at which optimizer step. `refresh_every` may change meanwhile, so it is read from the configuration.

    Attributes:
        config ([`TopKastConfig`]): the settings.
        exploration_end (`int`, *optional*): the step after which B is A.
        last_exchange (`int`, *optional*): the step of the last exchange of a share of A.
        density_window (`tuple[int, int]`, *optional*): the steps between which the density changes.
    """

    config: TopKastConfig
    exploration_end: int | None
    last_exchange: int | None
    density_window: tuple[int, int] | None

    @classmethod
    def of(cls, config: TopKastConfig, total_steps: int | None) -> "Timetable":
        """
        That of a training of so many optimizer steps.

        Raises:
            ValueError: if `total_steps` is no number of steps, or not given where a setting is a fraction, or if a
                schedule would end before it begins.
        """
        total_steps = plain(total_steps)
        allowed = "a whole number of optimizer steps, at least 1, or None"
        check(total_steps is None or whole(total_steps) >= 1, "total_steps", total_steps, allowed)
        moments = (resolve_step(name, config, total_steps) for name in ("explore_until", "update_until"))
        return cls(config, *moments, density_window(config, total_steps))

    def next_refresh(self, step: int) -> int:
        """The first step after `step` at which sets may change."""
        return next_refresh(step, self.config.refresh_every, self.density_window and self.density_window[1])

    def is_due(self, step: int) -> bool:
        """Whether step `step` ends in a refresh."""
        if not get_method(self.config.method).refreshes or self.next_refresh(step - 1) != step:
            return False
        resizes = self.density_window is not None and step <= self.density_window[1]
        return self.last_exchange is None or step <= self.last_exchange or resizes

    def drop(self, step: int) -> float:
        """The share of A that a refresh after step `step` exchanges."""
        return drop_share_at(step, self.config, self.last_exchange)

    def way_left(self, step: int) -> float:
        """The share of the way to the final density that is left after step `step`."""
        return way_left(step, self.config, self.density_window)

    def explores(self, step: int) -> bool:
        """Whether B may be larger than A after step `step`."""
        return self.exploration_end is None or step < self.exploration_end

    def moments(self) -> dict[str, Any]:
        """The steps at which its schedules begin and end, in JSON types; none where sets never change."""
        if not get_method(self.config.method).refreshes:
            return {}
        window = self.density_window and list(self.density_window)
        return {"exploration": self.exploration_end, "exchanges": self.last_exchange, "density": window}
