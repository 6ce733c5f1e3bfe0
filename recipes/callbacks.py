"""What is shown and noted while a run trains: how far it is, how its sets change, and what it takes."""

import os
import sys
import time
from datetime import timedelta
from typing import Any

from results import count_met_weights
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

from hf_topkast import sparsity_report
from hf_topkast.layer_log import read_layers
from hf_topkast.surgery import sparse_layers


logger = logging.get_logger("recipes.callbacks")

# What stands beside the bar, by the key that it is logged under.
TOLD = {"loss": "loss", "eval_loss": "eval loss", "topkast/density": "density", "topkast/mask_churn": "churn"}


class Progress(TrainerCallback):
    """
    Shows how far a training is: on a terminal one bar, else, as in a log file, a line for each twentieth of it.

    Args:
        bar (`bool`): Whether there may be a bar.
    """

    LINES = 20

    def __init__(self, bar: bool):
        self._has_bar = bar and sys.stderr.isatty()
        self._told: dict[str, str] = {}
        self._training = False
        self._evaluation: tqdm | None = None

    @classmethod
    def take_over(cls, trainer: Trainer):
        """Puts one in the place of what [`~transformers.Trainer`] would print, which is every log as a dictionary."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(cls(bar=not trainer.args.disable_tqdm))
        if not sys.stderr.isatty():
            disable_progress_bar()  # those of loading and saving

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the bar and the clock, of a resumed run where it goes on."""
        self._began, self._first, self._lines = time.monotonic(), state.global_step, self._line_of(state)
        self._training, self._said = True, state.global_step
        hidden = not (self._has_bar and state.is_world_process_zero)
        steps = {"total": state.max_steps, "initial": state.global_step}
        self._bar = tqdm(**steps, unit="step", disable=hidden, dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the bar on."""
        self._bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the numbers that say most."""
        self._told |= {name: f"{logs[key]:.4g}" for key, name in TOLD.items() if key in logs}
        if self._has_bar:
            self._bar.set_postfix_str(self._numbers())
        elif self._line_of(state) > self._lines and "loss" in logs:
            self._lines = self._line_of(state)
            self._say_step(state)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Shows how far an evaluation is; in a log file, that one has begun after the training, and how long it is."""
        if self._evaluation is None:
            batches = len(eval_dataloader)
            hidden = not (self._has_bar and state.is_world_process_zero)
            self._evaluation = tqdm(total=batches, unit="batch", disable=hidden, leave=False, dynamic_ncols=True)
            if hidden and not self._training:
                self._say(state, f"evaluating {batches:,} batches")
        self._evaluation.update()

    def on_evaluate(self, args, state, control, **kwargs):
        """Ends its bar."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_train_end(self, args, state, control, **kwargs):
        """Ends the bar; in a log file, the last line is of the last step."""
        self._bar.close()
        self._training = False
        if not self._has_bar and self._said < state.global_step:
            self._say_step(state)

    def _say_step(self, state):
        self._said = state.global_step
        numbers = f": {self._numbers()}" if self._told else ""
        self._say(state, f"step {state.global_step:,} of {state.max_steps:,}, {self._passed(state)}{numbers}")

    def _say(self, state, line: str):
        if state.is_world_process_zero and state.is_local_process_zero:
            print(line, file=sys.stderr, flush=True)

    def _numbers(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._told.items())

    def _line_of(self, state) -> int:
        return state.global_step * self.LINES // max(1, state.max_steps)

    def _passed(self, state) -> str:
        """The time that has passed, and what it will be at the end if all goes on like this."""
        passed = time.monotonic() - self._began
        whole = passed * (state.max_steps - self._first) / max(1, state.global_step - self._first)
        return f"{timedelta(seconds=round(passed))} of {timedelta(seconds=round(whole))}"


def read_churn(output_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The churn of each layer at each refresh of a run, `{"step": s, "layers": {name: churn}}`, by step."""
    lines = (
        {
            "step": entry["step"],
            "layers": {name: seen["churn"] for name, seen in entry["layers"].items() if "churn" in seen},
        }
        for entry in read_layers(output_dir)
    )
    return [line for line in lines if line["layers"]]


class Stopwatch(TrainerCallback, ExportableState):
    """
    Attributes:
        seconds (`float`): How long training took, those up to the checkpoint of a resumed run included.
    """

    def __init__(self):
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (0.0 if self._started is None else time.monotonic() - self._started)

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts, from where the checkpoint's run was."""
        self._before = _saved_attributes(self, state).get("seconds", 0.0)
        self._started = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        """Stops."""
        self._before, self._started = self.seconds, None

    def state(self) -> dict:
        """For `trainer_state.json`."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}


class Costs(TrainerCallback, ExportableState):
    """
    What the steps take of a model whose sets may change at any refresh.

    Attributes:
        flops_per_weight (`float`): FLOPs that one token costs for each weight of the sparse layers, summed over the
            steps: 2 for a weight of A forward, 2 for the gradient of the input, 2 for one of B for that of the weight.
            In a dense model 6 a step.
        peak_state_bytes (`int`): The most that parameters, gradients and Adam moments, indices and reservoir took.
    """

    def __init__(self):
        self.flops_per_weight, self.peak_state_bytes = 0.0, 0

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        """Starts, from what the checkpoint's run had taken."""
        self._layers = [layer for _, layer in sparse_layers(model)]
        self._met = [count_met_weights(model, each.numel, getattr(each, "experts", None)) for each in self._layers]
        self._sizes: list[tuple[float, float]] | None = None
        saved = _saved_attributes(self, state)
        self.peak_state_bytes = saved.get("peak_state_bytes", 0)
        self.flops_per_weight = saved.get("flops_per_weight", 0.0)
        if state.global_step and "flops_per_weight" not in saved:
            self.flops_per_weight = state.global_step * self._flops_per_weight()
            logger.warning(
                "The checkpoint has no count of what steps take, as an earlier version wrote it: its "
                f"{state.global_step:,} are counted as if the sets had had the sizes of now."
            )

    def on_step_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        """Adds what the step is going to take."""
        sizes = [(each.density, each.backward_density) for each in self._layers]
        if sizes != self._sizes:
            self._sizes = sizes
            self.peak_state_bytes = max(self.peak_state_bytes, sparsity_report(model).trainable_state_bytes)
        self.flops_per_weight += self._flops_per_weight()

    def _flops_per_weight(self) -> float:
        """Of the next step, mean over the weights that a token meets."""
        shares = [4 * each.density + 2 * each.backward_density for each in self._layers]
        return sum(met * share for met, share in zip(self._met, shares)) / sum(self._met) if shares else 6.0

    def state(self) -> dict:
        """For `trainer_state.json`."""
        return {
            "args": {},
            "attributes": {"flops_per_weight": self.flops_per_weight, "peak_state_bytes": self.peak_state_bytes},
        }


def _saved_attributes(callback: ExportableState, state: TrainerState) -> dict[str, Any]:
    """What the checkpoint that a run goes on from has of a callback; nothing if it begins, or if that one had none."""
    name = type(callback).__name__
    saved = state.stateful_callbacks.get(name) if state.global_step else None
    state.stateful_callbacks.setdefault(name, callback.state())  # Trainer writes into it, and does not ask
    return saved["attributes"] if saved else {}
