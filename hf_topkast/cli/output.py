"""What verbs print: tables for people, JSON for programs, and on the error stream that something takes long."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table


# Of every verb that prints.
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")]

# Where the output is no terminal, such as a file, lines are not cut to the width of one.
FILE_WIDTH = 200


def console(error: bool = False) -> Console:
    """The terminal, or what stands for it at the moment."""
    stream = sys.stderr if error else sys.stdout
    return Console(stderr=error, width=None if stream.isatty() else FILE_WIDTH, highlight=False, soft_wrap=False)


def print_json(value: Any):
    """Prints a value of JSON types; numbers that JSON has no word for, such as the loss of a diverged run, as null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_lines(*lines: str):
    """Prints lines of plain text, as they are."""
    for line in lines:
        print(line)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], last: Sequence[Sequence[str]] = ()):
    """
    Prints a table.

    Args:
        columns (`Sequence[str]`): titles; those that begin with `>` are of numbers, which are aligned to the right.
        rows (`Iterable[Sequence[str]]`): cells.
        last (`Sequence[Sequence[str]]`, *optional*): rows below a line, such as totals.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=False)
    for title in columns:
        right = title.startswith(">")
        table.add_column(title.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    rows = list(rows)
    for place, row in enumerate(rows):
        table.add_row(*row, end_section=bool(last) and place == len(rows) - 1)
    for row in last:
        table.add_row(*row, style="bold")
    console().print(table, markup=False)


def waiting(message: str) -> AbstractContextManager:
    """Shows a message on a terminal's error stream while a block runs."""
    return console(error=True).status(message)


def mebibytes(count: float | None) -> str:
    """Bytes in MiB, `-` for none."""
    return "-" if count is None else f"{count / 2**20:,.2f}"


def share(value: float | None) -> str:
    """A density, `-` for none."""
    return "-" if value is None else f"{value:.4f}"
