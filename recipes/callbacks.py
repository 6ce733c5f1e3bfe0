"""What is written down while a run trains: how the sets change, and how long it takes, over resumed runs as well."""

import json
import os
import time
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


CHURN_NAME = "churn.jsonl"


class ChurnLog(TrainerCallback):
    """
    Writes `churn.jsonl` in the output directory: for each refresh a line `{"step": s, "layers": {name: churn}}`, the
    share of a layer's A that left it.

    Args:
        trainer ([`~transformers.Trainer`]): The one that trains, a `TopKastTrainer`; it is asked for its controller.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._before: dict[str, float] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Drops what an earlier run wrote of steps that come again."""
        path = Path(args.output_dir, CHURN_NAME)
        if not state.is_world_process_zero or not path.exists():
            return
        kept = [json.dumps(line) + "\n" for line in read_churn(args.output_dir) if line["step"] <= state.global_step]
        temporary = path.with_name(CHURN_NAME + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)

    def on_step_begin(self, args, state, control, **kwargs):
        """Remembers the last refresh, to see whether this step has one."""
        self._before = self.trainer.topkast_controller.layer_churn

    def on_step_end(self, args, state, control, **kwargs):
        """Writes the line, if this step had a refresh."""
        churn = self.trainer.topkast_controller.layer_churn
        if churn is self._before or not state.is_world_process_zero:
            return
        with Path(args.output_dir, CHURN_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "layers": churn}) + "\n")


def read_churn(output_dir: str | os.PathLike) -> list[dict]:
    """
    The lines of a run's `churn.jsonl`, by step; none if there is no such file.

    The last line of a step counts, and what a killed run left unfinished at the end of the file does not.
    """
    path = Path(output_dir, CHURN_NAME)
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    lines = {line["step"]: line for line in map(json.loads, whole.splitlines())}
    return [lines[step] for step in sorted(lines)]


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
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        self._before = saved["attributes"]["seconds"] if saved else 0.0
        self._started = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        """Stops."""
        self._before, self._started = self.seconds, None

    def state(self) -> dict:
        """For `trainer_state.json`."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}
