"""One HTML file about runs, which needs nothing else: figures and tables, for narrow and wide, light and dark."""

import datetime
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .chart import Line, line_chart
from .heatmap import heatmap
from .read import QUALITIES, Run, named_apart
from .style import STYLE
from .table import Rows, cost_rows, outcome_rows, setting_rows, version_rows


def write_page(runs: Sequence[Run], output: str | os.PathLike):
    """
    Writes the report of one or more runs.

    Args:
        runs (`Sequence[Run]`): as [`read_run`] gives them.
        output (`str` or `os.PathLike`): the file to write.
    """
    Path(output).write_text(page(named_apart(runs)), encoding="utf-8")


def page(runs: Sequence[Run]) -> str:
    """The whole text of the file."""
    title = "Sparse training: " + ", ".join(run.name for run in runs)
    tables = (
        ("What came out", outcome_rows(runs)),
        ("Time and memory", cost_rows(runs)),
        ("Settings", setting_rows(runs)),
        ("Versions", version_rows(runs)),
    )
    outcome, *rest = (_table(heading, rows, runs) for heading, rows in tables)
    curves, maps = "".join(_curves(runs)), "".join(_maps(runs))
    parts = [outcome, _section("Over the steps", curves), _section("Layer by layer", maps), *rest, _commands(runs)]
    made = f"Written by hf-topkast report, {datetime.date.today().isoformat()}."
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(parts)}\n<footer>{made}</footer>\n</main>\n</body>\n</html>\n"
    )


def _curves(runs: Sequence[Run]):
    """The figures over the steps, in the order of reading."""

    def lines(key: str, suffix: str = "", dashed: bool = False) -> list[Line]:
        return [Line(run.name + suffix, run.series(key), place, dashed) for place, run in enumerate(runs)]

    yield line_chart("Loss, nats per token", [*lines("loss"), *lines("eval_loss", ", evaluation", dashed=True)])
    for key, name in QUALITIES.items():
        yield line_chart(f"{name.capitalize()}, evaluation", lines(f"eval_{key}"))
    yield line_chart("Churn: share of A that a refresh replaced", lines("topkast/mask_churn"), from_zero=True)
    yield line_chart("Reservoir use: share of the first C ever in A", lines("topkast/reservoir_use"), from_zero=True)
    densities = [*lines("topkast/density"), *lines("topkast/backward_density", ", backward", dashed=True)]
    yield line_chart("Density of the sparse layers", densities, from_zero=True)


def _maps(runs: Sequence[Run]):
    """Heat maps of each run that has logged its layers."""
    for run in runs:
        for key, title in (("density", "Density"), ("backward_density", "Backward density"), ("churn", "Churn")):
            entries = [entry for entry in run.layers if any(key in seen for seen in entry["layers"].values())]
            names = list(dict.fromkeys(name for entry in entries for name in entry["layers"]))
            rows = {name: [entry["layers"].get(name, {}).get(key) for entry in entries] for name in names}
            whose = f", {run.name}" if len(runs) > 1 else ""
            yield heatmap(f"{title} by layer{whose}", [entry["step"] for entry in entries], rows)


def _section(heading: str, figures: str) -> str:
    return f'<section><h2>{heading}</h2><div class="figures">{figures}</div></section>' if figures else ""


def _commands(runs: Sequence[Run]) -> str:
    commands = [(run.name, " ".join(run.results["command"])) for run in runs if run.results.get("command")]
    shown = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(command)}</code></dd>" for name, command in commands)
    return f"<section><h2>Commands</h2><dl>{shown}</dl></section>" if commands else ""


def _table(heading: str, rows: Rows, runs: Sequence[Run]) -> str:
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col"><i class="dot c{place % 8}"></i>{escape(run.name)}</th>' for place, run in enumerate(runs)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return (
        f'<section><h2>{heading}</h2><div class="wide"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )
