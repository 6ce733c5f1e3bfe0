"""When A and B change and to what, and optimizer state that moves with its weight."""

import time

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers.utils import logging

from .ahead import choose_ahead, take_next_sets
from .base_layer import TopKastLayer
from .config import TopKastConfig
from .distributed import check_agreement, local, raise_together, set_digest, world_size
from .engines import check_lag, check_resizing, rebuild_buckets
from .optimizers import carry_state, check_state
from .plan import SetPlan, Sizes
from .schedule import density_window, next_refresh, resolve_step, way_left
from .selection import check_finite
from .storage import Moment


logger = logging.get_logger(__name__)


class Refresher:
    """
    Changes the sets of a model's layers when the schedules say so.

    Args:
        root (`torch.nn.Module`): the model in which the layers have their names.
        layers (`dict[str, TopKastLayer]`): the sparse layers, by name.
        config ([`TopKastConfig`]): the settings.
        optimizer (`torch.optim.Optimizer`): the one whose state moves with the weights.
        ddp (`DistributedDataParallel`, *optional*): the wrapper whose buckets follow the sizes of the values.
        total_steps (`int`, *optional*): optimizer steps of the training.

    Attributes:
        exploration_end (`int`, *optional*): the step after which B is A.
        mask_churn (`float`, *optional*): share of A's members that left it at the last refresh.
        seconds (`float`, *optional*): how long training waited for the last refresh.

    Raises:
        ValueError: if a schedule needs `total_steps` and it is not given, or the plan cannot be made.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: dict[str, TopKastLayer],
        config: TopKastConfig,
        optimizer: Optimizer,
        ddp: DistributedDataParallel | None,
        total_steps: int | None,
    ):
        self.layers, self.config, self.optimizer = layers, config, optimizer
        self._ddp, self._group = ddp, None if ddp is None else ddp.process_group
        self._plan = SetPlan(root, {name: layer.pattern.shape for name, layer in layers.items()}, config)
        self.exploration_end = resolve_step("explore_until", config, total_steps)
        self._density_window = density_window(config, total_steps)
        self._arrived = config.initial_density is not None and self._is_at_final_density()
        if total_steps is not None and self._density_window is not None and self._density_window[1] > total_steps:
            logger.warning(
                f"schedule_end={config.schedule_end!r} lies after the last of {total_steps} steps, so this "
                f"training does not reach density={config.density}. Give an earlier schedule_end."
            )
        self.mask_churn: float | None = None
        self.seconds: float | None = None

    def check_engine(self):
        """
        Whether the engine that runs the model can follow what the settings will change.

        Raises:
            ValueError: if it cannot; the message names the setting.
        """
        explores = any(layer.backward_density > layer.density for layer in self.layers.values())
        setting = None
        if self.exploration_end is not None and explores:
            setting = f"explore_until={self.config.explore_until!r}"
        elif self._density_window is not None and not self._arrived:
            setting = f"initial_density={self.config.initial_density!r}"
        elif self.config.distribution == "global":
            setting = "distribution='global'"
        if setting is not None:
            check_resizing(setting, self.layers.values(), self._ddp)
        if self.config.refresh_lag:
            check_lag(self.config.refresh_lag, self.layers.values())

    def after_step(self, step: int):
        """Does what is due after optimizer step `step`: a refresh, the end of exploration, a choice ahead."""
        if self._next(step - 1) == step:
            self.refresh(step)
        if step == self.exploration_end:
            self.end_exploration()
        if self.config.refresh_lag and self._next(step) == step + self.config.refresh_lag:
            self._choose_ahead(self._next(step))

    def refresh(self, step: int):
        """Changes A and B of every layer to what was chosen ahead, or chooses them now, in the sizes of `step`."""
        if not self._plan.method.refreshes:
            return
        start = time.perf_counter()
        self._check_numbers()
        stored = self._stored()
        ahead = all(layer.next_sets is not None for layer in self.layers.values())
        sizes = {} if ahead else self._sizes(step, self.layers)
        members = left = 0
        for name, layer in self.layers.items():
            theta = layer.theta()
            was_active = layer.pattern.active_mask()
            active, backward = take_next_sets(layer) if ahead else self._plan.choose(name, theta, sizes[name])
            self._reassign(name, active, backward, theta)
            members += int(was_active.sum())
            left += int((was_active & ~active).sum())
        self.check_agreement()
        if self._ddp is not None and stored != self._stored():
            rebuild_buckets(self._ddp)
        self.mask_churn = left / members
        self.seconds = time.perf_counter() - start

    def end_exploration(self):
        """Makes B := A in every layer."""
        self._check_numbers()
        for name, layer in self.layers.items():
            active = layer.pattern.active_mask()
            self._reassign(name, active, active, layer.theta())
        if self._ddp is not None:
            rebuild_buckets(self._ddp)

    def forget_choice(self):
        """Drops what was chosen ahead."""
        for layer in self.layers.values():
            layer.next_sets = None

    def check_agreement(self):
        """
        Whether all ranks have the same sets.

        Raises:
            RuntimeError: if they do not, see [`check_agreement`].
        """
        if world_size(self._group) > 1:
            patterns = [(name, layer.pattern) for name, layer in self.layers.items()]
            digests = {name: set_digest(sets.flat_index(), sets.active, sets.row_offsets) for name, sets in patterns}
            check_agreement(digests, self._group)

    def _next(self, step: int) -> int:
        return next_refresh(step, self.config.refresh_every, self._density_window and self._density_window[1])

    def _choose_ahead(self, step: int):
        """Has a thread choose the sets of the refresh at `step` from the present weights."""
        if self._plan.method.refreshes:
            self._check_numbers()
            choose_ahead(self.layers, self._plan, lambda moments: self._sizes(step, moments))

    @torch.no_grad()
    def _sizes(self, step: int, layers: dict[str, TopKastLayer] | dict[str, Moment]) -> dict[str, Sizes]:
        left = 0.0 if self._arrived else way_left(step, self.config, self._density_window)
        exploring = self.exploration_end is None or step < self.exploration_end

        def read(name: str) -> Tensor:
            # A pruned model keeps as many as it had at first, which the present sets still tell.
            nonzero = self.config.density == "nonzero"
            return layers[name].pattern.active_mask() if nonzero else layers[name].theta()

        return self._plan.sizes(left, exploring, read)

    def _is_at_final_density(self) -> bool:
        """Whether a former training has ended the schedule: the model would lose its sparsity if it began again."""
        sizes = self._plan.sizes(0.0, True, lambda name: self.layers[name].theta())
        final = sum(size for parts in sizes.values() for size, _ in parts)
        return final == sum(layer.active_count for layer in self.layers.values())

    def _stored(self) -> list[int]:
        return [layer.values.numel() for layer in self.layers.values()]

    def _check_numbers(self):
        """All layers before the first one changes; what is outside B cannot have changed."""
        problem = None
        try:
            for name, layer in self.layers.items():
                check_finite(local(layer.values), name)
                check_state(self.optimizer, name, layer.values)
        except ValueError as error:
            problem = error
        raise_together(problem, self._group)

    def _reassign(self, name: str, active: Tensor, backward: Tensor, theta: Tensor):
        layer = self.layers[name]
        sources = layer.reassign(active, backward, theta)
        state = self.optimizer.state.get(layer.values)
        if state:
            carry_state(state, sources, self.config.new_state)
