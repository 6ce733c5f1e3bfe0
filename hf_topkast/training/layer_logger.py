"""What each sparse layer does over a training: into a file of the run, and as histograms to TensorBoard and W&B."""

import os
from typing import Any

import numpy as np
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..checks import check, whole
from ..layer_log import append_entry, forget_after
from .controller import TopKastController
from .optimizers import unwrap_optimizer
from .watch import controller_of


class TopKastLayerLogger(TrainerCallback):
    """
    Logs density, backward density and churn of every sparse layer at an interval.

    They go into `topkast_layers.jsonl` in the output directory, from where `hf-topkast report` draws them, and with
    [`TopKastTrainer`] as histograms over the layers to TensorBoard and W&B, where `report_to` names these. It costs
    nothing to speak of: the numbers are known from the refresh.

    Example:

    ```python
    TopKastTrainer(model=model, args=training_args, callbacks=[TopKastLayerLogger(every=500)], ...).train()
    ```

    Args:
        every (`int`, *optional*): optimizer steps between two entries; by default there is one after each refresh.
        histograms (`bool`, *optional*, defaults to `True`): whether the loggers get histograms.

    Attributes:
        loggers (`list[TrainerCallback]`): the trainer's callbacks, among which the loggers are; [`TopKastTrainer`]
            sets it.

    Raises:
        ValueError: if `every` is not a positive whole number.
    """

    def __init__(self, every: int | None = None, histograms: bool = True):
        check(every is None or whole(every) >= 1, "every", every, "a positive whole number, or None for each refresh")
        self.every, self.histograms = every, histograms
        self.loggers: list[TrainerCallback] = []
        self._churn: dict[str, float] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Drops what an earlier run wrote of steps that come again."""
        if state.is_world_process_zero:
            forget_after(args.output_dir, state.global_step)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Notes what the training starts from, and the last refresh, to see whether this step has one."""
        controller = controller_of(unwrap_optimizer(optimizer))
        if controller is None:
            raise ValueError(
                "TopKastLayerLogger found no TopKastController: use TopKastTrainer, or give Trainer a TopKastCallback "
                "before it."
            )
        self._churn = controller.layer_churn
        if state.global_step == 0:
            self._log(args.output_dir, state, controller)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Logs, if it is time."""
        controller = controller_of(unwrap_optimizer(optimizer))
        refreshed = controller.layer_churn is not self._churn
        if refreshed if self.every is None else state.global_step % self.every == 0:
            self._log(args.output_dir, state, controller)

    def _log(self, directory: str | os.PathLike[str], state: TrainerState, controller: TopKastController) -> None:
        if not state.is_world_process_zero:
            return
        churn = controller.layer_churn or {}
        layers = {}
        for name, layer in controller.layers.items():
            layers[name] = {"density": layer.density, "backward_density": layer.backward_density}
            if name in churn:
                layers[name]["churn"] = churn[name]
        append_entry(directory, state.global_step, layers)
        if self.histograms:
            for kind in ("density", "backward_density", "churn"):
                numbers = [numbers[kind] for numbers in layers.values() if kind in numbers]
                if numbers:
                    self._send(f"topkast/layers/{kind}", np.array(numbers), state.global_step)

    def _send(self, name: str, numbers: np.ndarray, step: int) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardCallback) and logger.tb_writer is not None:
                logger.tb_writer.add_histogram(name, numbers, step)
            elif isinstance(logger, WandbCallback) and logger._wandb is not None:
                logger._wandb.log({name: logger._wandb.Histogram(numbers), "train/global_step": step})
