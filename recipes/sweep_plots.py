"""Plots of a sweep, one PNG each, of the rows that are finished; a plot with nothing in it is not made."""

import itertools
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from callbacks import read_churn
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from sweep_plan import Run, Sweep, parse_run
from sweep_tables import best_runs, summarize

from hf_topkast.runs.read import STATE, read_run


# What lines run along or what they are chosen by: it does not tell one line from another.
ALONG_A_LINE = {"density", "backward_density", "method", "sparse", "output_dir", "seed"}

PARTS = 20  # of a training, each a point of its loss


def draw_plots(sweep: Sweep, finished: dict[Path, dict]) -> list[Path]:
    """
    Draws what the finished rows show: the metric against density, its gap to row `dense`, against training FLOPs and
    against bytes of training state, each on the test split; and the churn of each layer over the steps.

    Args:
        sweep ([`Sweep`]): All rows.
        finished (`dict[Path, dict]`): Results of finished runs by directory.

    Returns:
        `list[Path]`: The images.
    """
    found = {row.name: (row, best_runs(sweep, row, finished)) for row in sweep.rows}
    found = {name: (row, runs) for name, (row, runs) in found.items() if runs}
    points = {name: summarize(sweep, row, finished, {}) for name, (row, runs) in found.items()}
    lines = group_rows(sweep, {name: runs[0] for name, (_, runs) in found.items()})
    drawn = [
        _against(sweep, lines, points, "density", "density of the sparse layers"),
        _against(sweep, lines, points, "density", "density of the sparse layers", gap=True),
        _against(sweep, lines, points, "training_flops", "training FLOPs"),
        _against(sweep, lines, points, "peak_state_bytes", "bytes of training state, at most"),
        _losses(sweep, {name: read_losses(runs[0].folder) for name, (_, runs) in found.items()}),
        _churn(sweep, {name: read_churn(runs[0].folder) for name, (_, runs) in found.items()}),
    ]
    return [path for path in drawn if path is not None]


def group_rows(sweep: Sweep, runs: dict[str, Run]) -> dict[str, list[str]]:
    """
    Rows that make one line, by its label: of one method, with a B that is as many times A, and equal in all fields but
    density. The label is what their names have after a comma ("80/60, ours" and "90/80, ours"), or else the method and
    the fields that differ.

    Args:
        sweep ([`Sweep`]): Says which field is tuned.
        runs (`dict[str, Run]`): A run of each row.

    Returns:
        `dict[str, list[str]]`: Names of rows by label; those of dense models under `""`.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs.values():
        alike.setdefault(_kind(run), []).append(run)
    lines: dict[str, list[str]] = {}
    for kind, members in alike.items():
        keys = {key for run in members for key in run.settings} - ALONG_A_LINE - {sweep.tune}
        differing = sorted(key for key in keys if len({str(run.settings.get(key)) for run in members}) > 1)
        for run in members:
            more = [f"{key} {run.settings[key]}" for key in differing if key in run.settings and kind]
            lines.setdefault(", ".join([kind, *more]), []).append(run.row)
    short = {label: (label and _shared_ending(names)) or label for label, names in lines.items()}
    taken = Counter(short.values())
    return {short[label] if taken[short[label]] == 1 else label: names for label, names in lines.items()}


def _shared_ending(names: list[str]) -> str:
    """What all names, of which there are several, have after their first comma; nothing if they differ."""
    endings = {name.partition(", ")[2] for name in names}
    return endings.pop() if len(endings) == 1 and len(names) > 1 else ""


def _kind(run: Run) -> str:
    """The method, and what B is beside A; nothing for a dense model."""
    model_args, _, _, topkast, _, _ = parse_run(run)
    if not model_args.sparse or topkast.density == 1:  # as gap_cpu.yaml has it
        return ""
    if topkast.backward_density in (None, topkast.density):
        return topkast.method
    if topkast.density == "nonzero":
        return f"{topkast.method}, B = {topkast.backward_density:g}"
    if topkast.backward_density == 1:
        return f"{topkast.method}, B = all"
    return f"{topkast.method}, B = {topkast.backward_density / topkast.density:g} A"


def _against(
    sweep: Sweep,
    lines: dict[str, list[str]],
    points: dict[str, dict[str, Any]],
    key: str,
    label: str,
    gap: bool = False,
) -> Path | None:
    """The metric, or its gap to row `dense`, against another number of the rows; a line a method."""
    zero = points.get("dense", {}).get("test_mean")
    if not any(lines) or (gap and zero is None):
        return None
    metric = next(iter(points.values()))["metric"].replace("_", " ")
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for (line, names), marker in zip(lines.items(), itertools.cycle("osD^vPX<>*ph")):
        chosen = sorted((points[name] for name in names), key=lambda point: point[key])
        heights = [point["test_mean"] - (zero if gap else 0) for point in chosen]
        spreads = [point["test_std"] or 0 for point in chosen]
        if line:
            axes.errorbar([point[key] for point in chosen], heights, spreads, marker=marker, capsize=3, label=line)
        elif key == "density":  # dense models have no place on this axis
            for point, height in zip(chosen, heights):
                axes.axhline(height, color="black", linestyle="-" if point["row"] == "dense" else ":", linewidth=1)
                axes.annotate(point["row"], (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        else:
            axes.errorbar([point[key] for point in chosen], heights, spreads, fmt="ks", capsize=3, label="dense")
            for point, height in zip(chosen, heights):
                axes.annotate(point["row"], (point[key], height), xytext=(4, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel=label, ylabel=f"gap to dense, {metric}" if gap else f"{metric}, test")
    if key == "density":
        shown = sorted({points[name][key] for line, names in lines.items() if line for name in names})
        axes.set_xticks(shown, [f"{density:g}" for density in shown])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")
    figure.legend(fontsize="small", loc="outside right upper")
    return _save(figure, sweep, "gap_to_dense.png" if gap else f"metric_by_{key}.png")


def read_losses(folder: Path) -> dict[int, float]:
    """The logged training loss of a run, in nats a token, by step; nothing where Trainer's log is gone."""
    return dict(read_run(folder).series("loss")) if (folder / STATE).is_file() else {}


def _losses(sweep: Sweep, losses: dict[str, dict[int, float]]) -> Path | None:
    """The training loss minus that of row `dense`, which saw the same batches, as means over parts of the training."""
    dense = losses.get("dense", {})
    losses = {name: loss for name, loss in losses.items() if name != "dense" and loss.keys() & dense.keys()}
    if not losses:
        return None
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=1)
    for (name, loss), style in zip(losses.items(), itertools.cycle(["-"] * 10 + ["--"] * 10)):
        steps = sorted(loss.keys() & dense.keys())
        size = max(1, len(steps) // PARTS)
        parts = [steps[start : start + size] for start in range(0, len(steps), size)]
        gaps = [statistics.fmean(loss[step] - dense[step] for step in part) for part in parts]
        axes.plot([statistics.fmean(part) for part in parts], gaps, style, label=name)
    axes.set(xlabel="optimizer steps", ylabel="training loss minus dense, nats a token")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    return _save(figure, sweep, "loss_to_dense.png")


def _churn(sweep: Sweep, churns: dict[str, list[dict]]) -> Path | None:
    """A panel a row, a line a layer, from the first (dark) to the last (light), and their mean in red."""
    churns = {name: churn for name, churn in churns.items() if churn}
    if not churns:
        return None
    columns = min(4, len(churns))
    rows = -(-len(churns) // columns)
    figure = Figure(figsize=(3.5 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for (name, churn), axes in zip(churns.items(), panels):
        steps = [line["step"] for line in churn]
        layers = list(churn[-1]["layers"])
        for place, layer in enumerate(layers):
            colour = str(0.8 * place / max(1, len(layers) - 1))
            axes.plot(steps, [line["layers"][layer] for line in churn], color=colour, linewidth=0.7)
        means = [sum(line["layers"].values()) / len(line["layers"]) for line in churn]
        axes.plot(steps, means, color="tab:red", linewidth=1.8, marker="." if len(steps) == 1 else None)
        axes.set(title=name, xlabel="optimizer steps", ylabel="churn of A", ylim=(0, None))
        axes.grid(alpha=0.3)
    for axes in panels:
        axes.set_visible(False)
    return _save(figure, sweep, "churn.png")


def _save(figure: Figure, sweep: Sweep, name: str) -> Path:
    path = sweep.output_dir / name
    figure.savefig(path, dpi=120)
    return path
