"""`hf-topkast plot`: one logged metric of one or more runs."""

from pathlib import Path
from typing import Annotated

import typer

from .output import AsJson, print_json, print_lines


def plot(
    runs: Annotated[list[str], typer.Argument(help="Output directories of Trainer, or checkpoints of theirs.")],
    metric: Annotated[str, typer.Option(help="The logged key.")] = "topkast/mask_churn",
    output: Annotated[Path, typer.Option(help="The image to write; its ending says which kind.")] = Path("plot.png"),
    as_json: AsJson = False,
):
    """
    Draw a logged metric of one or more runs over the steps.

    Examples:

        hf-topkast plot runs/demo

        hf-topkast plot runs/dense runs/sparse --metric loss --output loss.svg
    """
    from ..plots import plot_metric

    plot_metric(runs, metric, output)
    if as_json:
        print_json({"output": str(output), "metric": metric, "runs": runs})
    else:
        print_lines(f"wrote {output}")
