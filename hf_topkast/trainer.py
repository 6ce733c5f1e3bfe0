"""Top-KAST under `transformers.Trainer`: thin, since all mask work is the controller's."""

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from .checkpoint import CheckpointError, load_checkpoint
from .controller import TopKastController
from .surgery import sparse_layers, sparse_root


class TopKastCallback(TrainerCallback, ExportableState):
    """
    Runs a [`TopKastController`] during `Trainer.train()`, and saves and restores its step count.

    [`TopKastTrainer`] adds it by itself. It also works in a stock `Trainer`, without resuming and best-model loading,
    which need [`TopKastTrainerMixin`].

    Attributes:
        controller ([`TopKastController`]): the one of the running or last training, `None` before the first.
    """

    def __init__(self):
        self.controller: TopKastController | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Makes the controller, once the optimizer is there and a resumed state is loaded."""
        if self.controller is not None:
            self.controller.remove()
        root = sparse_root(model)
        loaded_step = root.topkast_step
        self.controller = TopKastController(model, optimizer, total_steps=state.max_steps)
        if state.global_step > 0:
            saved = self._saved_state(state)
            if isinstance(root, PreTrainedModel):  # the files of other modules hold no step
                self._check_same_moment(saved, loaded_step)
            self.controller.load_state_dict(saved)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Adds the `topkast/` metrics for the loggers that come after this callback."""
        if self.controller is not None and "loss" in logs and "topkast/density" not in logs:
            logs.update(self.controller.metrics())

    def on_train_end(self, args, state, control, **kwargs):
        """Leaves the optimizer as it was."""
        self.controller.remove()

    def state(self) -> dict:
        """The controller's state, for `trainer_state.json`."""
        return {"args": {}, "attributes": {"saved": self.controller.state_dict() if self.controller else None}}

    def _saved_state(self, state) -> dict:
        exported = state.stateful_callbacks.get(type(self).__name__)
        saved = exported and exported["attributes"]["saved"]
        if not saved:
            raise CheckpointError(
                f"The checkpoint of step {state.global_step} has no Top-KAST state in its trainer_state.json, so the "
                "mask schedule cannot be resumed. Resume from a checkpoint that TopKastTrainer wrote, or start a new "
                "training from its weights (without resume_from_checkpoint)."
            )
        return saved

    def _check_same_moment(self, saved: dict, loaded_step: int):
        if saved["step"] != loaded_step:
            raise CheckpointError(
                f"The checkpoint mixes two moments: its trainer_state.json is of optimizer step {saved['step']}, its "
                f"weights are of step {loaded_step}. Resume from another checkpoint."
            )


class TopKastTrainerMixin:
    """
    Makes any `transformers.Trainer` subclass train sparse models: `class MyTrainer(TopKastTrainerMixin, SFTTrainer)`.

    It refuses a model without sparse layers, keeps sparse values out of weight decay, logs the `topkast/` metrics to
    every logger, and resumes bit by bit. Everything else, the arguments included, is the base trainer's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        sparse_root(self.model)
        self.add_callback(TopKastCallback())

    @property
    def topkast_controller(self) -> TopKastController | None:
        """The controller of the running or last training."""
        callbacks = self.callback_handler.callbacks
        return next((found.controller for found in callbacks if isinstance(found, TopKastCallback)), None)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As the base trainer's, without the values of sparse layers: the exploration penalty takes their place."""
        sparse = {f"{name}.values" for name, _ in sparse_layers(model)}
        return [name for name in super().get_decay_parameter_names(model) if name not in sparse]

    def log(self, logs: dict[str, float], *args, **kwargs):
        """Logs with the `topkast/` metrics beside each training loss."""
        if self.topkast_controller is not None and "loss" in logs:
            logs = {**logs, **self.topkast_controller.metrics()}
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if isinstance(self.model, PreTrainedModel):
            load_checkpoint(self.model, resume_from_checkpoint)
        else:  # saved as its plain state dict, which is complete
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if isinstance(self.model, PreTrainedModel):
            load_checkpoint(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()


class TopKastTrainer(TopKastTrainerMixin, Trainer):
    """
    `transformers.Trainer` for models that [`sparsify`] has made sparse; takes the same arguments.

    Example:

    ```python
    model = sparsify(model, density=0.2)
    TopKastTrainer(model=model, args=training_args, train_dataset=dataset).train()
    ```
    """
