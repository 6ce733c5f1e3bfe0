"""The Top-KAST schedule as a callback of `transformers.Trainer`, with its place in a checkpoint."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..checkpoints import CheckpointError
from ..sets import get_method
from ..surgery import sparse_info
from .borrowed import borrowers
from .controller import TopKastController


AHEAD_NAME = "topkast_ahead.pt"  # in a checkpoint beside optimizer.pt: sets chosen for the next refresh


class TopKastCallback(TrainerCallback, ExportableState):
    """
    Runs a [`TopKastController`] during `Trainer.train()`, and saves and restores its step count.

    [`TopKastTrainer`] adds it by itself. It also works in a stock `Trainer`, without resuming and best-model loading,
    which need [`TopKastTrainerMixin`].

    Attributes:
        controller ([`TopKastController`]): the one of the running or last training, `None` before the first.
        wrapped (`torch.nn.Module`, *optional*): the model as DDP has wrapped it, which callbacks are not told.
        ahead (`dict`, *optional*): sets that the training to be resumed had chosen for its next refresh.
    """

    def __init__(self) -> None:
        self.controller: TopKastController | None = None
        self.wrapped: nn.Module | None = None
        self.ahead: dict[str, Any] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Makes the controller, once the optimizer is there and a resumed state is loaded."""
        if self.controller is not None:
            self.controller.remove()
        wrapped = model if self.wrapped is None else self.wrapped
        check_reference(args, wrapped)
        # Of no step at all, too: Trainer takes num_train_epochs=0.
        self.controller = TopKastController(wrapped, optimizer, total_steps=max(1, state.max_steps))
        resumed = state.global_step > 0
        schedule = saved_schedule(state.stateful_callbacks, state.global_step) if resumed else {"step": 0}
        if schedule.get("ahead") and self.ahead is None:
            raise CheckpointError(
                f"The checkpoint of step {state.global_step} has no {AHEAD_NAME}, which holds the sets chosen for its "
                "next refresh, so training cannot be resumed exactly. Keep the files of a checkpoint together."
            )
        self.controller.load_state_dict({**schedule, "ahead": self.ahead if schedule.get("ahead") else None})
        self.ahead = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the `topkast/` metrics for the loggers that come after this callback."""
        if self.controller is not None and "loss" in logs and "topkast/density" not in logs:
            logs.update(self.controller.metrics())

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leaves the optimizer as it was; says so if the model, perhaps the best one, is denser than it was to be."""
        self.controller.remove()
        self.controller.warn_if_unfinished()

    def state(self) -> dict[str, Any]:
        """The controller's state, for `trainer_state.json`, without the tensors of sets chosen ahead."""
        return {"args": {}, "attributes": {"saved": self.controller and self.controller.state_dict(ahead=False)}}


def check_reference(args: TrainingArguments, model: nn.Module, reference: nn.Module | None = None) -> None:
    """
    Refuses reference models, as trainers of TRL have, that are no reference.

    Raises:
        ValueError: if `sync_ref_model` is set where sets change, or if the reference runs the model itself.
    """
    other = isinstance(reference, nn.Module) and reference is not model
    borrowing = borrowers(reference, model) if other else []
    if borrowing:
        name = f"ref_model.{borrowing[0]}".rstrip(".")
        raise ValueError(
            "The reference model's forward runs the model in training: it is a copy of it, made after a trainer had "
            f"given the model a forward of its own, and copies hold the former one. Call `del {name}.forward` before "
            "you give it to the trainer, or load it from where it was saved."
        )
    refreshes = get_method(sparse_info(model).config.method).refreshes
    if refreshes and getattr(args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True averages the reference model's parameters with this model's slot by slot, and a "
            "slot means another weight after each refresh. Set it to False, and keep the reference as it is, or "
            "as a TopKastAveragedModel (docs/averages.md)."
        )


def saved_schedule(stateful_callbacks: dict[str, Any], step: int) -> dict[str, Any]:
    """
    The controller's state in what Trainer saved of its callbacks.

    Raises:
        CheckpointError: if there is none.
    """
    exported = stateful_callbacks.get(TopKastCallback.__name__)
    saved = exported and exported["attributes"]["saved"]
    if not saved:
        raise CheckpointError(
            f"The checkpoint of step {step} has no Top-KAST state in its {TRAINER_STATE_NAME}, so the mask schedule "
            "cannot be resumed. Resume from a checkpoint that TopKastTrainer wrote, or start a new training from its "
            "weights (without resume_from_checkpoint)."
        )
    return saved
