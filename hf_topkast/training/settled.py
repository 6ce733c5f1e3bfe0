"""Settings that are read once, when a controller is made: a later change would do nothing, without a word."""

import copy
from dataclasses import fields
from typing import Any

from ..config import TopKastConfig


# Settings that may change during training, and count from the next step or refresh on.
LIVE = {"density", "backward_density", "refresh_every", "penalty", "new_state", "exploration_lr_scale"}


class Settled:
    """
    Remembers the settings that a controller works with.

    Args:
        config ([`TopKastConfig`]): the settings, of which those that are not `LIVE` are to stay.
    """

    def __init__(self, config: TopKastConfig):
        self._config = config
        self._settings = copy.deepcopy(self._now())

    def _now(self) -> dict[str, Any]:
        names = [spec.name for spec in fields(self._config) if spec.name not in LIVE]
        if self._config.new_state == "fresh":  # which needs an optimizer that can do it, and counts from the start
            names.append("new_state")
        return {name: getattr(self._config, name) for name in names}

    def check(self):
        """
        Raises:
            ValueError: if one has been changed; the message names it, its values and the way out.
        """
        now = self._now()
        if now != self._settings:
            names = [*now, *self._settings]
            name = next(name for name in names if now.get(name) != self._settings.get(name))
            former = self._settings.get(name, "another value")
            raise ValueError(
                f"{name}={getattr(self._config, name)!r} was set after the TopKastController was made, which works "
                f"with {former!r}. Set it back; or remove() the controller and make a new one."
            )
