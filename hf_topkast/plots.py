"""Plots of what a training logged."""

import importlib.util
import os
from collections.abc import Sequence

from .runs import Run, named_apart, read_run


def plot_metric(runs: Sequence[str | os.PathLike], metric: str, output: str | os.PathLike):
    """
    Draws one logged metric of several runs over the optimizer steps.

    Args:
        runs (`Sequence[str or os.PathLike]`): output directories of Trainer, or checkpoints of theirs.
        metric (`str`): a logged key, such as `"topkast/mask_churn"`.
        output (`str` or `os.PathLike`): the image to write; its ending chooses the format.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a run has no log, or nothing was logged under that key; the message lists what was.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("Plots need matplotlib: pip install 'hf-topkast[recipes]'.")
    curves = {run.name: _points(run, metric) for run in named_apart([read_run(run) for run in runs])}
    from matplotlib.figure import Figure  # heavy, and optional

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points), label=name)
    axes.set(xlabel="optimizer steps", ylabel=metric, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)


def _points(run: Run, metric: str) -> list[tuple[float, float]]:
    points = run.series(metric)
    if not points:
        logged = sorted({key for entry in run.history for key in entry} - {"step"})
        raise ValueError(f"{run.directory} logged no values of '{metric}'. It has: {', '.join(logged)}.")
    return points
