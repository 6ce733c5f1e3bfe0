"""What happens around an optimizer step: the penalty before it, a refresh after it, all from the optimizer's hooks."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..layers import TopKastLayer
from ..storage import find_handles
from ..surgery import sparse_info, sparse_layers, sparse_root
from .cautions import warn_of_restart, warn_of_unfinished_schedule
from .changes import ValueChanges
from .engines import check_engine, find_ddp
from .metrics import density_of, learning_rate_metric, penalty_of_layers, size_metrics
from .optimizers import check_optimizer, holds_state, unwrap_optimizer
from .own_groups import OwnGroups
from .refresher import Refresher
from .settled import Settled
from .step_guard import StepGuard
from .watch import controller_of, unwatch, watch


class TopKastController:
    """
    Runs Top-KAST in any training loop: plain, Accelerate, TRL or Trainer.

    It hooks the optimizer's step and needs no other call. Before a step it adds the exploration penalty (with
    `step(closure)` after the closure), after it it counts the step and, when one is due, chooses A and B again and
    moves the optimizer's state with its weights.

    Make it after the optimizer; schedulers may come before or after it. The values of sparse layers are left out of
    the optimizer's own weight decay: the penalty has its place. A copy (`copy.deepcopy`, pickle) of model, optimizer
    and controller together trains on by itself.

    Args:
        model (`torch.nn.Module`): a model that [`sparsify`] has made sparse, wrapped or not.
        optimizer (`torch.optim.Optimizer`): the one that trains it, wrapped by Accelerate or not.
        total_steps (`int`, *optional*): optimizer steps of the training; needed where `explore_until`,
            `schedule_begin` or `schedule_end` is a fraction.

    Raises:
        ValueError: if the model has no sparse layer, if an engine runs it that cannot follow, if the optimizer cannot
            be used (the message names it and says why), does not hold a trainable layer's values or has a controller
            already, if `total_steps` is no number of steps, or if a schedule needs it and it is not given.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, total_steps: int | None = None):
        self.optimizer = unwrap_optimizer(optimizer)
        check_engine(model, self.optimizer)
        self._info = sparse_info(model)
        self._ddp = find_ddp(model)
        model = model if self._ddp is None else self._ddp.module
        self.config = self._info.config
        root = sparse_root(model)
        self.layers: dict[str, TopKastLayer] = dict(sparse_layers(root))
        self._refresher = Refresher(root, self.layers, self.config, self.optimizer, self._ddp, total_steps)
        self._settled = Settled(self.config)
        self._changes = ValueChanges(self.layers, self.config, self.optimizer)

        values = {name: layer.values for name, layer in self.layers.items() if layer.values.requires_grad}
        check_optimizer(self.optimizer, values, self.config)
        if controller_of(self.optimizer) is not None:
            raise ValueError(
                "The optimizer has a TopKastController already, and two would apply everything twice. Call remove() "
                "on the first one. (TopKastTrainer makes its own.)"
            )
        sparse = [layer.values for layer in self.layers.values()]
        self._groups = OwnGroups(self.optimizer, sparse, self.config.lr_scale)
        self._refresher.check_changes()
        handles = find_handles(root)
        for layer in self.layers.values():
            layer.shard_rest(handles)
        self._refresher.check_agreement()
        self._restart = self._former_training(sparse)
        self.step = 0
        self._see_layers()
        self._attach()
        if self._refresher.timetable.exploration_end == 0:
            self._refresher.end_exploration()
            self._see_layers()
        self._refresher.expect(1)

    @property
    def step(self) -> int:
        """Optimizer steps taken; kept on the model, so that a checkpoint of the model has it."""
        return self._info.step

    @step.setter
    def step(self, step: int) -> None:
        self._info.step = step

    def _attach(self) -> None:
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._on_step_begin),
            self.optimizer.register_step_post_hook(self._on_step_end),
        ]
        if self.config.powerprop_alpha != 1:
            self._hooks.append(StepGuard(self.optimizer, self._changes.settle))
        watch(self)

    def remove(self) -> None:
        """Takes the hooks off the optimizer: from then on A and B stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._changes.settle()  # of a step that an error has ended
        self._refresher.expect(None)
        unwatch(self)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks are not copied with an optimizer; those of a controller that was removed are not to come back.
        return {**self.__dict__, "_hooks": controller_of(self.optimizer) is self}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_hooks"]:
            self._attach()
            self._refresher.expect(self.step + 1)
        else:
            self._hooks = []

    # What happens around a step. The hooks are kept out of a compiled step: traced, they would move the optimizer's
    # state of one layer by the sources of another.

    @torch.compiler.disable
    @torch.no_grad()
    def _on_step_begin(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._skips(optimizer):
            return None
        self._settled.check()
        self._warn_of_restart()
        self._check_layers()
        self._refresher.buckets.check()
        self._changes.settle()  # of a step that an error has ended
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._refresher.before_step(self.step + 1)
        self._groups.begin()
        if closure is None:
            self._begin_changes()
            return None

        def closure_and_changes() -> Any:
            self._changes.settle()
            with self._groups.given_back_on_error():
                loss = closure()
                with torch.no_grad():
                    self._refresher.before_step(self.step + 1)
            self._begin_changes()
            return loss

        return args[:1], {**kwargs, "closure": closure_and_changes}

    @torch.no_grad()
    def _begin_changes(self) -> None:
        with self._groups.given_back_on_error():
            self._changes.begin(self._density, self._compares())

    def _former_training(self, values: list[nn.Parameter]) -> str | None:
        """What tells of a training before this one: the model's count of steps, which state dicts lack, or moments."""
        if self.step:
            return f"The model has been trained for {self.step} steps"
        return "The optimizer has moments of a former training" if holds_state(self.optimizer, values) else None

    def _compares(self) -> bool:
        """Whether to look how hard the penalty pulls: at first, since sets may never change, and where they do."""
        return self.step == 0 or self._refresher.timetable.is_due(self.step + 1)

    def _warn_of_restart(self) -> None:
        """At the first step and not before: between the two the state may be loaded."""
        if self._restart is not None:
            warn_of_restart(self._restart)
            self._restart = None

    def _skips(self, optimizer: Optimizer) -> bool:
        """Whether a fused optimizer is about to skip this step, or has, for an overflow under a gradient scaler."""
        overflow = getattr(optimizer, "found_inf", None)
        return overflow is not None and bool(overflow)

    def _see_layers(self) -> None:
        """Remembers how often the layers got other sets, and the density that the penalty divides by."""
        self._seen = {name: layer.assignments for name, layer in self.layers.items()}
        self._density = self.density

    def _check_layers(self) -> None:
        """Moments must not meet weights that they do not belong to."""
        for name, count in self._seen.items():
            layer = self.layers[name]
            if "values" not in layer._parameters:
                raise ValueError(
                    f"Layer '{name}' has no parameter 'values' any more: something else stands in its place (by "
                    "torch.nn.utils.prune, for example), and a refresh would mix up its weights. Take it off "
                    "(prune.remove(layer, 'values')). To have fewer weights, lower controller.config.density."
                )
            if layer.assignments != count and not self.optimizer.state.get(layer.values):
                self._see_layers()  # loaded before the first step
            elif layer.assignments != count:
                raise ValueError(
                    f"Layer '{name}' got other weights (load_state_dict, for example) since the controller last saw "
                    "it, and the optimizer's state belongs to the former ones. Load the optimizer's state as well, "
                    "then call controller.load_state_dict; or make a new optimizer and a new controller."
                )

    @torch.compiler.disable
    @torch.no_grad()
    def _on_step_end(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._skips(optimizer):
            self._changes.settle()
            self._groups.end()
            self._refresher.expect(self.step + 1)  # without what the skipped passes have left
            return
        self._changes.end()
        self._groups.end()
        self.step += 1
        if self._refresher.after_step(self.step):
            self._see_layers()
        self._refresher.expect(self.step + 1)

    # Changing the sets

    @torch.no_grad()
    def refresh(self) -> None:
        """
        Chooses A and B of every layer again from |θ|, layer by layer, in the sizes that the schedules give them now;
        optimizer state moves with its weight. What was chosen ahead is forgotten. With `method="static"` nothing
        changes.

        Raises:
            ValueError: if a weight is NaN or infinite (the message names the layer), or if that changes sizes which
                what wraps the model cannot follow.
        """
        self._refresher.forget_choice()
        self._refresher.before_refresh(self.step)
        if self._refresher.refresh(self.step):
            self._see_layers()

    @torch.no_grad()
    def end_exploration(self) -> None:
        """
        Makes B := A in every layer from now on, which gives the memory and the work of the rest back.

        Raises:
            ValueError: if what wraps the model cannot follow the sizes; nothing has changed then.
        """
        self._refresher.stop_exploring(self.step)
        self._see_layers()

    def warn_if_unfinished(self) -> None:
        """Says so if the model, of a training that has ended, is still on the way of its density schedule."""
        if self._refresher.way_left(self.step) > 0:
            warn_of_unfinished_schedule(self._refresher.timetable, self.step, self.density)

    # What is logged and saved

    @property
    def mask_churn(self) -> float | None:
        """Share of A's members that left it at the last refresh; `None` before the first."""
        return self._refresher.mask_churn

    @property
    def layer_churn(self) -> dict[str, float] | None:
        """The same by layer, of those that were refreshed; `None` before the first refresh of this controller."""
        return self._refresher.layer_churn

    @property
    def refresh_seconds(self) -> float | None:
        """How long training waited for the last refresh, in seconds; `None` before the first."""
        return self._refresher.seconds

    @property
    def density(self) -> float:
        """Σ|A| / Σn over the sparse layers, as it is now."""
        return density_of(self.layers.values())

    @torch.no_grad()
    def penalty(self) -> float:
        """The penalty at the present values, λ/2·(Σ_A θ² + Σ_{B\\A} θ²/density), in nats like the loss."""
        return penalty_of_layers(self.layers.values(), self.config, self._density)

    def metrics(self) -> dict[str, float]:
        """What loggers show, under `topkast/`: densities, churn, reservoir use, penalty and the refresh's seconds."""
        metrics = {
            **size_metrics(self.layers.values()),
            "topkast/penalty": self.penalty(),
            **learning_rate_metric(self.layers.values(), self.optimizer, self.config),
        }
        if self.mask_churn is not None:
            metrics["topkast/mask_churn"] = self.mask_churn
        if self.refresh_seconds is not None:
            metrics["topkast/refresh_seconds"] = self.refresh_seconds
        return metrics

    def state_dict(self, ahead: bool = True) -> dict[str, Any]:
        """
        The step count and the last churn, as JSON types, and with `refresh_lag`, where a refresh was chosen ahead, the
        sets under `"ahead"`, with tensors (with `ahead=False` only whether it was). Everything else is in the model
        and the optimizer.
        """
        return {"step": self.step, **self._refresher.state_dict(ahead)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continues from [`state_dict`]. Load the model and the optimizer as well.

        Raises:
            ValueError: if `state` has no step count, or sets for other layers, or if DDP cannot follow the sizes that
                the model has been loaded with.
        """
        if not isinstance(state.get("step"), int):
            raise ValueError(f"Not the state of a TopKastController: it needs an integer 'step', got {state!r}.")
        self._refresher.load_state_dict(state)
        self.step, self._restart = state["step"], None
        self._see_layers()
        self._refresher.expect(self.step + 1)
