"""When A and B change and to what, and optimizer state that moves with its weight."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..config import TopKastConfig
from ..layers import TopKastLayer
from ..sets import Present, SetPlan, Sizes, Timetable
from ..storage import Matrix, Moment, check_agreement, set_digest, world_size
from .ahead import Choice, choice_key, choose_ahead, taken_sets
from .cautions import warn_of_other_moments, warn_of_schedule
from .engines import Buckets, check_lag, check_resizing
from .observer import StepObserver
from .optimizers import check_outside_changes
from .reassignment import check_numbers, check_reservoirs, reassign, reservoirs


class Refresher:
    """
    Changes the sets of a model's layers when the schedules say so. A frozen layer keeps its sets and sizes.

    Args:
        root (`torch.nn.Module`): the model in which the layers have their names.
        layers (`dict[str, TopKastLayer]`): the sparse layers, by name.
        config ([`TopKastConfig`]): the settings.
        optimizer (`torch.optim.Optimizer`): the one whose state moves with the weights.
        ddp (`DistributedDataParallel`, *optional*): the wrapper whose buckets follow the sizes of the values.
        total_steps (`int`, *optional*): optimizer steps of the training.

    Attributes:
        timetable ([`Timetable`]): when it does.
        buckets ([`Buckets`]): those of the wrapper.
        mask_churn (`float`, *optional*): share of A's members that left it at the last refresh.
        layer_churn (`dict[str, float]`, *optional*): the same, by layer.
        seconds (`float`, *optional*): how long training waited for the last refresh.

    Raises:
        ValueError: if a schedule needs `total_steps` and it is not given, the plan cannot be made, or a setting does
            not go with the optimizer.
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
        check_outside_changes(optimizer, config)
        self.layers, self.config, self.optimizer = layers, config, optimizer
        self._ddp, self._group = ddp, None if ddp is None else ddp.process_group
        self.buckets = Buckets(layers, ddp)
        self._plan = SetPlan(root, {name: layer.pattern.shape for name, layer in layers.items()}, config)
        check_reservoirs(layers, config.method)
        self.timetable = Timetable.of(config, total_steps)
        self._arrived = config.initial_density is not None and self._is_at_final_density()
        if not self._arrived:
            warn_of_schedule(self._plan, layers, self.timetable, total_steps)
        self.mask_churn: float | None = None
        self.layer_churn: dict[str, float] | None = None
        self._observer = StepObserver(layers, config, self._group)
        self.seconds: float | None = None
        self._choice: Choice | None = None
        self._stopped: int | None = None  # the step at which somebody ended exploration

    def check_changes(self):
        """
        Whether the engine that runs the model can follow what the settings will change.

        Raises:
            ValueError: if it cannot; the message names the setting.
        """
        explores = any(layer.backward_density > layer.density for layer in self._moving().values())
        setting = None
        if self.timetable.exploration_end is not None and explores:
            setting = f"explore_until={self.config.explore_until!r}"
        elif self.timetable.density_window is not None and not self._arrived:
            setting = f"initial_density={self.config.initial_density!r}"
        elif self.config.distribution == "global":
            setting = "distribution='global'"
        if setting is not None:
            check_resizing(setting, self._moving().values(), self._ddp)
        if self.config.refresh_lag:
            check_lag(self.config.refresh_lag, self.layers.values())

    def before_step(self, step: int):
        """
        Before optimizer step `step`, if it ends in a refresh: whether all weights are numbers, while one that is none
        has not spoilt the others yet.

        Raises:
            ValueError: if a weight is NaN or infinite; the message names the layer.
        """
        if self.timetable.is_due(step):
            check_numbers(self.layers, self.optimizer, self._group)
            self._observer.check(step)

    def after_step(self, step: int) -> bool:
        """
        Does what is due after optimizer step `step`: a refresh, the end of exploration, a choice ahead. Says whether
        layers got other weights.
        """
        changed = self.timetable.is_due(step) and self.refresh(step)
        if step == self.timetable.exploration_end:
            self.end_exploration()
            changed = True
        coming = self.timetable.next_refresh(step)
        if self.config.refresh_lag and coming == step + self.config.refresh_lag and self.timetable.is_due(coming):
            self._choose_ahead(coming)
        return changed

    def expect(self, step: int | None):
        """
        Before the passes of optimizer step `step`: has the layers keep what the refresh after it will need of them,
        and no longer what an earlier one needed. `None`: there will be no step.
        """
        self._observer.expect(step is not None and self.timetable.is_due(step))

    def before_refresh(self, step: int):
        """
        Before a refresh that is not due.

        Raises:
            ValueError: if the method needs gradients, which only a step that ends in a refresh has.
        """
        self._observer.check(step)

    def refresh(self, step: int) -> bool:
        """
        Changes A and B of every layer to what was chosen ahead for this step, or chooses them now, in the sizes of the
        step. Says whether it did: a method may never refresh, and layers may all be frozen.
        """
        moving = self._moving()
        if not (self._plan.method.refreshes and moving):
            return False
        start = time.perf_counter()
        check_numbers(self.layers, self.optimizer, self._group)
        self._observer.follow_inputs()
        chosen = self._take_choice(step)
        sizes = self._sizes(step, moving) if chosen is None else {}
        self.buckets.expect({name: sum(stored for _, stored in parts) for name, parts in sizes.items()})
        moving = {name: layer for name, layer in moving.items() if name not in self._observer.unseen}
        members = {name: layer.active_count for name, layer in moving.items()}
        arriving, left = reservoirs(moving.values()), {}
        for name, layer in moving.items():
            if chosen is None:
                sets = self._plan.matrix_sizes(name, sizes[name]), partial(self._choose, step, name, sizes[name])
            else:
                sets = taken_sets(chosen.pop(name), layer)
            left[name] = reassign(layer, *sets, arriving, self.optimizer, self.config)
        self.check_agreement()
        self.buckets.fit("A refresh")
        self.layer_churn = {name: left[name] / count for name, count in members.items()}
        self.mask_churn = sum(left.values()) / max(1, sum(members.values()))
        self.seconds = time.perf_counter() - start
        return True

    def end_exploration(self):
        """Makes B := A in every layer."""
        check_numbers(self.layers, self.optimizer, self._group)
        moving = self._moving().values()
        arriving = reservoirs(moving)
        for layer in moving:
            sizes = [(part.blocks.members, part.blocks.members) for part in layer.parts]
            reassign(layer, sizes, _without_exploration, arriving, self.optimizer, self.config)
        self.buckets.fit("The end of exploration")

    def stop_exploring(self, step: int):
        """
        Makes B := A in every layer after step `step`, and keeps it so, whatever `explore_until` says.

        Raises:
            ValueError: if what wraps the model cannot follow; nothing has changed then.
        """
        exploring = [layer for layer in self._moving().values() if layer.backward_density > layer.density]
        if exploring:
            check_resizing("end_exploration()", exploring, self._ddp)
        self._stopped, self.timetable = step, replace(self.timetable, exploration_end=step)
        self.end_exploration()

    def way_left(self, step: int) -> float:
        """The share of the density schedule's way that is left after a step; 0 where a former training ended it."""
        return 0.0 if self._arrived else self.timetable.way_left(step)

    def forget_choice(self):
        """Drops what was chosen ahead."""
        self._choice = None

    def state_dict(self, ahead: bool = True) -> dict[str, Any]:
        """
        The last churn, whether a density schedule had ended before this training, when somebody ended exploration, the
        timetable's moments, and under `"ahead"` what was chosen for the next refresh, with tensors, which it waits
        for; with `ahead=False` only whether there is such a choice.
        """
        state = {"mask_churn": self.mask_churn, "arrived": self._arrived, "stopped": self._stopped}
        state["moments"] = self.timetable.moments()
        if not ahead:
            return {**state, "ahead": self._choice is not None}
        return state if self._choice is None else {**state, "ahead": self._choice.state_dict()}

    def load_state_dict(self, state: dict[str, Any]):
        """
        Continues from [`state_dict`].

        Raises:
            ValueError: if what was chosen ahead is not for these layers.
        """
        self.mask_churn, self._choice, ahead = state.get("mask_churn"), None, state.get("ahead")
        self._arrived = state.get("arrived", self._arrived)
        self._stopped = state.get("stopped")
        if self._stopped is not None:
            self.timetable = replace(self.timetable, exploration_end=self._stopped)
        self.buckets.follow_load()
        warn_of_other_moments(state.get("moments"), self.timetable.moments(), state.get("step"))
        if ahead is None:
            return
        expected = {name: (2, -(-layer.numel // 8)) for name, layer in self._moving().items()}
        found = {name: tuple(sets.shape) for name, sets in ahead["sets"].items() if sets.dtype == torch.uint8}
        if found != expected:
            raise ValueError("The sets in the state of this TopKastController, chosen ahead, are of another model.")
        self._choice = Choice(ahead["key"], dict(ahead["sets"]))

    def check_agreement(self):
        """
        Whether all ranks have the same sets.

        Raises:
            RuntimeError: if they do not, see [`check_agreement`].
        """
        if world_size(self._group) > 1:
            patterns = [(name, layer.pattern) for name, layer in self.layers.items()]
            digests = {name: set_digest(sets) for name, sets in patterns}
            check_agreement(digests, self._group)

    def _moving(self) -> dict[str, TopKastLayer]:
        """The layers that are trained: what is frozen computes the same for ever, as a base under adapters must."""
        return {name: layer for name, layer in self.layers.items() if layer.values.requires_grad}

    def _choose(self, step: int, name: str, sizes: Sizes, matrix: Matrix) -> tuple[Tensor, Tensor]:
        present = self._present(step, matrix, self._observer.gradients_of(name))
        return self._plan.choose(name, matrix.scored(), sizes, present, matrix.place)

    def _present(self, step: int, matrix: Matrix, gradients: Any = None) -> Present:
        masks = cache(matrix.pattern.active_mask), cache(matrix.pattern.backward_mask)  # made for those who ask
        return Present(step, *masks, self.timetable.drop(step), gradients)

    def _choose_ahead(self, step: int):
        """Has a thread choose the sets of the refresh at `step` from the present weights."""
        check_numbers(self.layers, self.optimizer, self._group)
        functions = partial(self._sizes, step), partial(self._present, step)
        self._choice = choose_ahead(self._key(step), self._moving(), self._plan, *functions)

    def _take_choice(self, step: int) -> dict[str, Tensor] | None:
        """What was chosen ahead for this step under these settings, once."""
        choice, self._choice = self._choice, None
        return None if choice is None else choice.taken(self._key(step), self._group)

    def _key(self, step: int) -> list:
        explores = self.timetable.explores(step)
        return choice_key(self.config, list(self._moving()), step, self.way_left(step), explores)

    @torch.no_grad()
    def _sizes(self, step: int, layers: dict[str, TopKastLayer] | dict[str, Moment]) -> dict[str, Sizes]:
        # A pruned model keeps as many as it had at first, which the present sets still tell.
        read = _reader(layers, sets=self.config.density == "nonzero")
        sizes = self._plan.sizes(self.way_left(step), self.timetable.explores(step), read, list(layers))
        return {name: self._plan.reachable_sizes(name, sizes[name], layers[name].row_offsets) for name in layers}

    def _is_at_final_density(self) -> bool:
        """Whether a former training has ended the schedule: the model would lose its sparsity if it began again."""
        moving = self._moving()
        final = self._plan.sizes(0.0, True, _reader(moving), list(moving))
        present = {name: self._plan.present_sizes(name, moving[name].row_offsets) for name in final}
        counts = [[size for parts in sizes.values() for size, _ in parts] for sizes in (final, present)]
        if self.config.distribution == "global":  # whose shares have moved on since the last refresh
            counts = [[sum(count)] for count in counts]
        return bool(moving) and counts[0] == counts[1]


def _reader(layers: dict[str, TopKastLayer] | dict[str, Moment], sets: bool = False) -> Callable[[str, int], Tensor]:
    """Gives what ranks the weights of one matrix of a layer, or with `sets` its A; both (out, in)."""

    @lru_cache(maxsize=1)  # the matrices of a layer are read one after another
    def stored(name: str) -> Moment:
        return layers[name].stored()

    def read(name: str, place: int) -> Tensor:
        return stored(name).pattern_of(place).active_mask() if sets else stored(name).matrix(place).scored()

    return read


def _without_exploration(matrix: Matrix) -> tuple[Tensor, Tensor]:
    active = matrix.pattern.active_mask()
    return active, active
