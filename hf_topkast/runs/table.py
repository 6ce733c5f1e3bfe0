"""What runs came to, side by side: rows of words and numbers."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from .read import QUALITIES, Run


Rows = list[tuple[str, list[str]]]
NOTHING = "–"


def outcome_rows(runs: Sequence[Run]) -> Rows:
    """What the models are worth and how sparse they are."""
    rows: Rows = []
    for key, name in QUALITIES.items():
        at_end = any(run.results.get(f"valid_{key}") for run in runs)
        for split in ("valid", "test") if at_end else ("eval",):
            rows.append((f"{name}, {split}", _each(runs, lambda run, key=f"{split}_{key}": run.last(key), "{:.4f}")))
    rows += [
        ("training loss, last", _each(runs, lambda run: run.last("loss"), "{:.4f}")),
        ("density", _each(runs, lambda run: run.density, "{:.4f}")),
        ("backward density", _each(runs, lambda run: run.backward_density, "{:.4f}")),
        ("parameters used", _each(runs, lambda run: run.results.get("nonzero_parameters"), "{:,}")),
        ("parameters, dense", _each(runs, lambda run: run.results.get("parameters"), "{:,}")),
        ("churn, last", _each(runs, lambda run: run.last("topkast/mask_churn"), "{:.4f}")),
        ("reservoir use", _each(runs, lambda run: run.last("topkast/reservoir_use"), "{:.4f}")),
        ("optimizer steps", _each(runs, lambda run: run.steps, "{:,}")),
        ("tokens", _each(runs, lambda run: run.results.get("tokens"), "{:,}")),
    ]
    return _told(rows)


def cost_rows(runs: Sequence[Run]) -> Rows:
    """Time, memory and arithmetic, and what the dense model takes for the same."""
    rows: Rows = [("training time", _each(runs, lambda run: run.seconds, lambda s: str(timedelta(seconds=round(s)))))]
    dense = [run for run in runs if not run.sparse and _pace(run)]
    if len(dense) == 1 and len(runs) > 1:
        rows.append((f"speed, over {dense[0].name}", _each(runs, lambda run: _speed(run, dense[0]), "{:.2f}×")))
    memory = _each(runs, lambda run: _over(run, "peak_state_bytes", "dense_state_bytes"), "{:.2f}")
    flops = _each(runs, lambda run: _over(run, "training_flops", "dense_training_flops"), "{:.2f}")
    rows += [
        ("training state, at most", _each(runs, lambda run: run.results.get("peak_state_bytes"), _mebibytes)),
        ("training state, at the end", _each(runs, lambda run: run.results.get("state_bytes"), _mebibytes)),
        ("training state, dense", _each(runs, lambda run: run.results.get("dense_state_bytes"), _mebibytes)),
        ("memory, over dense", memory),
        ("training FLOPs, over dense", flops),
        ("device", _each(runs, lambda run: run.results.get("device"), "{}")),
    ]
    return _told(rows)


def setting_rows(runs: Sequence[Run]) -> Rows:
    """The settings of the sparsity that any run has, its seed and its data."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.settings) if key != "quant_method"]
    rows = [(key, _each(runs, lambda run, key=key: _said(run.settings.get(key)), "{}")) for key in keys]
    rows.append(("seed of the run", _each(runs, lambda run: run.results.get("seed"), "{}")))
    rows.append(("data", _each(runs, lambda run: run.results.get("dataset"), "{}")))
    return _told(rows)


def version_rows(runs: Sequence[Run]) -> Rows:
    """Versions that the runs were made with."""
    versions = {run.name: run.results.get("versions", {}) for run in runs}
    names = list(dict.fromkeys(name for each in versions.values() for name in each))
    rows = [(name, _each(runs, lambda run, name=name: versions[run.name].get(name), "{}")) for name in names]
    rows.append(("commit", _each(runs, lambda run: (run.results.get("git_commit") or "")[:12] or None, "{}")))
    return _told(rows)


def _each(runs: Sequence[Run], value: Callable[[Run], Any], form: str | Callable[[Any], str]) -> list[str]:
    write = form.format if isinstance(form, str) else form
    return [NOTHING if found is None else write(found) for found in map(value, runs)]


def _told(rows: Rows) -> Rows:
    """Without the rows that say nothing."""
    return [(name, cells) for name, cells in rows if any(cell != NOTHING for cell in cells)]


def _said(setting: Any) -> str | None:
    return None if setting in (None, [], {}, "") else str(setting)


def _over(run: Run, key: str, dense_key: str) -> float | None:
    mine, dense = run.results.get(key), run.results.get(dense_key)
    return mine / dense if mine and dense else None


def _pace(run: Run) -> float | None:
    """Seconds for a token, or for a step where tokens were not counted."""
    return run.seconds / (run.results.get("tokens") or run.steps) if run.seconds and run.steps else None


def _speed(run: Run, dense: Run) -> float | None:
    """How many times as fast as a dense run of the same machine; `None` for another one."""
    same = run.results.get("device") == dense.results.get("device")
    counted = bool(run.results.get("tokens")) == bool(dense.results.get("tokens"))
    return _pace(dense) / _pace(run) if same and counted and _pace(run) else None


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
