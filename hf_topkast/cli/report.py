"""`hf-topkast report`: what one or more runs did, as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from .output import AsJson, print_json, print_lines


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output directories of Trainer or of the recipes.")],
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    as_json: AsJson = False,
):
    """
    Write a page about one or more runs: losses, quality, churn, densities by layer, time and memory, settings.

    It is one file that needs no network. Put a dense run beside the sparse ones to have times compared. Densities and
    churn by layer are there if the run had a TopKastLayerLogger, as the recipes have.

    Examples:

        hf-topkast report runs/demo

        hf-topkast report runs/dense runs/sparse --output both.html
    """
    from ..runs import read_run, write_page

    found = [read_run(run) for run in runs]
    write_page(found, output)
    if as_json:
        print_json({"output": str(output), "runs": [run.to_dict() for run in found]})
    else:
        print_lines(f"wrote {output}, {output.stat().st_size / 1024:,.0f} kB")
