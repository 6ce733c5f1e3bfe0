"""What came out of a sweep: `table.md`, `table.csv` (a line a row) and `runs.csv` (a line a run)."""

import csv
import io
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

from sweep_plan import Row, Run, Sweep, metric_of


# What a row has besides the metric, as means over its seeds.
AVERAGED = ("density", "backward_density", "nonzero_parameters", "peak_state_bytes", "training_flops", "train_seconds")


def read_results(sweep: Sweep, known: dict[Path, dict] | None = None) -> dict[Path, dict]:
    """
    The results of all finished runs by directory, `known` ones not read again.

    Which runs there are depends on results: those of the first seed are read before those of the others.
    """
    finished = dict(known or {})
    for row in sweep.rows:
        for runs in (sweep.first_runs, lambda row: sweep.wanted_runs(row, finished)):
            for run in runs(row):
                if run.folder not in finished and (run.folder / "results.json").exists():
                    finished[run.folder] = read_result(run)
    return finished


def read_result(run: Run) -> dict[str, Any]:
    """
    The results of a finished run.

    Raises:
        `ValueError`: If they lack what the tables need, as those of another version of `run_clm.py` may.
    """
    path = run.folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in AVERAGED if key not in results]
    if missing:
        raise ValueError(
            f"`{path}` has no `{missing[0]}`: another version of run_clm.py wrote it. Delete its folder to run it "
            "again, or give another `output_dir`."
        )
    return results


def best_runs(sweep: Sweep, row: Row, finished: dict[Path, dict]) -> list[Run]:
    """The runs of all seeds at the best value; none while a run of the row is missing."""
    best = sweep.best_value(row, finished)
    runs = [] if best is None else [sweep.run(row, best[0], seed) for seed in sweep.seeds]
    return runs if all(run.folder in finished for run in runs) else []


def write_tables(sweep: Sweep, failed: dict[Path, str]) -> list[str]:
    """
    Writes the tables of what there is so far.

    Args:
        sweep ([`Sweep`]): All rows.
        failed (`dict[Path, str]`): Runs that failed, by directory.

    Returns:
        `list[str]`: The rows whose best value lies at an edge of its grid, with it.
    """
    finished = read_results(sweep)
    summaries = {row.name: summarize(sweep, row, finished, failed) for row in sweep.rows}
    dense = summaries.get("dense", {})
    for summary in summaries.values():
        if "metric" in dense and summary.get("metric") == dense["metric"]:
            summary["gap_to_dense"] = summary["test_mean"] - dense["test_mean"]
    runs = [
        describe_run(sweep, run, finished, failed) for row in sweep.rows for run in sweep.wanted_runs(row, finished)
    ]
    metrics = sorted({metric_of(results) for results in finished.values()})
    sweep.output_dir.mkdir(parents=True, exist_ok=True)
    _write(sweep.output_dir / "table.csv", _as_csv(list(summaries.values())))
    _write(sweep.output_dir / "runs.csv", _as_csv(runs))
    parts = [
        f"# {sweep.output_dir.resolve().name}\n",
        _about(sweep, metrics, finished),
        _as_markdown([_row_cells(sweep, summary) for summary in summaries.values()]),
        "\n## All runs\n",
        _as_markdown([_run_cells(run) for run in runs]),
    ]
    _write(sweep.output_dir / "table.md", "\n".join(parts))
    return [f"{s['row']} ({s[sweep.tune]})" for s in summaries.values() if s.get("edge")]


def summarize(sweep: Sweep, row: Row, finished: dict[Path, dict], failed: dict[Path, str]) -> dict[str, Any]:
    """A row of the table as numbers: without results while runs are missing."""
    wanted = sweep.wanted_runs(row, finished)
    done, lost = (sum(run.folder in where for run in wanted) for where in (finished, failed))
    summary = {"row": row.name, "runs_done": done, "runs": sweep.total_runs(row, finished), "runs_failed": lost}
    runs = best_runs(sweep, row, finished)
    if not runs:
        return summary
    results = [finished[run.folder] for run in runs]
    value = runs[0].value
    summary |= {sweep.tune: value, "edge": sweep.is_at_edge(row, value), "metric": metric_of(results[0])}
    for split in ("valid", "test"):
        scores = [result[f"{split}_{summary['metric']}"] for result in results]
        summary[f"{split}_mean"] = statistics.fmean(scores)
        whole = len(scores) > 1 and all(map(math.isfinite, scores))
        summary[f"{split}_std"] = statistics.stdev(scores) if whole else None
    summary["seeds"] = len(runs)
    summary["gap_to_dense"] = None
    for key in AVERAGED:
        summary[key] = statistics.fmean(result[key] for result in results)
    return summary


def describe_run(sweep: Sweep, run: Run, finished: dict[Path, dict], failed: dict[Path, str]) -> dict[str, Any]:
    """A single run as numbers."""
    line = {"row": run.row, sweep.tune: run.value, "seed": run.seed}
    if run.folder not in finished:
        return {**line, "state": "failed" if run.folder in failed else "not done"}
    results = finished[run.folder]
    metric = metric_of(results)
    keys = (
        "density",
        "backward_density",
        "training_flops",
        "train_seconds",
        "steps",
        "tokens",
        "device",
        "git_commit",
    )
    scores = {split: results[f"{split}_{metric}"] for split in ("valid", "test")}
    return {**line, "state": "done", "metric": metric, **scores, **{key: results[key] for key in keys}}


def _about(sweep: Sweep, metrics: list[str], finished: dict[Path, dict]) -> str:
    many = len(sweep.seeds)
    of = f"seed {sweep.seeds[0]}"
    if sweep.seeds_everywhere and many > 1:
        of = f"the mean of seeds {sweep.seeds}"
    elif sweep.seeds_within and many > 1:
        of += f", and by the mean of seeds {sweep.seeds} where that is within {sweep.seeds_within} of another"
    lines = [
        f"valid and test: {' or '.join(metrics) or 'not known yet'}, less is better"
        + (f"; mean ± standard deviation over {many} seeds" if many > 1 else "")
        + f". `{sweep.tune}` is the best of those tried, on valid, by {of}; *edge*: it is the smallest or largest of "
        "them, and a better one may lie beyond. Gap: test, minus that of row `dense`. Non-zeros: parameters that the "
        "forward pass uses at the end. Training state: parameters, gradients, two Adam moments, indices, reservoir, "
        "at their most. Training FLOPs: products with weights, 2·(2·#A + #B) a token and sparse layer, 6·n a dense "
        "one.\n"
    ]
    places = sorted({f"{r['device']}, commit {str(r['git_commit'])[:10]}" for r in finished.values()})
    lines += [f"Run on: {'; '.join(places)}.\n"] if places else []
    return "\n".join(lines)


def _row_cells(sweep: Sweep, summary: dict[str, Any]) -> dict[str, str]:
    cells = dict.fromkeys([sweep.tune, "valid", "test", "seeds", "gap to dense", "non-zeros", "training state"], "")
    cells = {"row": summary["row"], **cells, "training FLOPs": "", "seconds": ""}
    if "metric" not in summary:
        lost = f", {summary['runs_failed']} failed" if summary["runs_failed"] else ""
        return {**cells, "valid": f"{summary['runs_done']} of {summary['runs']} runs{lost}"}
    cells[sweep.tune] = _cell(summary[sweep.tune]) + (" *edge*" if summary["edge"] else "")
    for split in ("valid", "test"):
        spread = summary[f"{split}_std"]
        cells[split] = f"{summary[f'{split}_mean']:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
    gap = summary["gap_to_dense"]
    return cells | {
        "seeds": str(summary["seeds"]),
        "gap to dense": "" if gap is None else f"{gap:+.4f}",
        "non-zeros": f"{summary['nonzero_parameters']:,.0f}",
        "training state": f"{summary['peak_state_bytes'] / 1e6:,.1f} MB",
        "training FLOPs": f"{summary['training_flops']:.3g}",
        "seconds": f"{summary['train_seconds']:,.0f}",
    }


def _run_cells(run: dict[str, Any]) -> dict[str, str]:
    cells = {key: _cell(value) for key, value in list(run.items())[:3]}
    if run["state"] != "done":
        return {**cells, "valid": run["state"], "test": "", "training FLOPs": "", "seconds": ""}
    cells |= {split: f"{run[split]:.4f}" for split in ("valid", "test")}
    return cells | {"training FLOPs": f"{run['training_flops']:.3g}", "seconds": f"{run['train_seconds']:,.0f}"}


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _as_markdown(lines: list[dict[str, str]]) -> str:
    header = list(lines[0])
    rows = [header, ["---"] * len(header), *([line[key].replace("|", "\\|") for key in header] for line in lines)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _as_csv(lines: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    fields = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    """Whole or not at all: several runners may write at once, and one may be killed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    os.replace(temporary, path)
