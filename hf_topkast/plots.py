"""Plots of what a training logged."""

import json
import os
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import is_matplotlib_available


def read_metric(run: str | os.PathLike, metric: str) -> tuple[list[int], list[float]]:
    """
    The steps and values of one logged metric, from the `trainer_state.json` of a run or of one of its checkpoints.

    Args:
        run (`str` or `os.PathLike`): an output directory of Trainer.
        metric (`str`): a logged key, such as `"topkast/mask_churn"`.

    Raises:
        ValueError: if there is no such file, or nothing was logged under that key; the message lists what was.
    """
    path = Path(run) / TRAINER_STATE_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the output_dir of a Trainer run, or one of its checkpoints.")
    history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    points = [(entry["step"], entry[metric]) for entry in history if metric in entry]
    if not points:
        logged = sorted({key for entry in history for key in entry})
        raise ValueError(f"{path} has no values of '{metric}'. It has: {', '.join(logged)}.")
    steps, values = zip(*points)
    return list(steps), list(values)


def plot_metric(runs: dict[str, str | os.PathLike], metric: str, output: str | os.PathLike):
    """
    Draws one logged metric of several runs over the optimizer steps.

    Args:
        runs (`dict[str, str or os.PathLike]`): output directories by the label of their curve.
        metric (`str`): a logged key.
        output (`str` or `os.PathLike`): the image to write; its ending chooses the format.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: as [`read_metric`] does.
    """
    if not is_matplotlib_available():
        raise ImportError("Plots need matplotlib: pip install hf-topkast[recipes].")
    from matplotlib.figure import Figure  # heavy, and optional

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, run in runs.items():
        axes.plot(*read_metric(run, metric), label=label)
    axes.set(xlabel="optimizer steps", ylabel=metric, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)
