"""`hf-topkast inspect`: what is sparse in a checkpoint, from its files alone."""

from typing import Annotated

import typer

from .checkpoint import open_checkpoint
from .output import AsJson, mebibytes, print_json, print_lines, print_table, share
from .summary import CheckpointSummary, summarize


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A directory written by save_pretrained, or a name on the hub.")],
    count_zeros: Annotated[
        bool, typer.Option("--count-zeros", help="Of a dense checkpoint: read its matrices and count their zeros.")
    ] = False,
    as_json: AsJson = False,
):
    """
    Show what is sparse in a checkpoint, layer by layer.

    No model is built and no weight is read, so that it takes the same moment for any size. Whether another tool has
    changed the weights since is seen when they are loaded, not here.

    Examples:

        hf-topkast inspect runs/demo

        hf-topkast inspect runs/demo/checkpoint-500 --json

        hf-topkast inspect gpt2 --count-zeros
    """
    summary = summarize(open_checkpoint(checkpoint), count_zeros)
    if as_json:
        print_json(summary.to_dict())
    else:
        print_summary(summary)


def print_summary(summary: CheckpointSummary):
    """Prints a summary as a table, with what concerns the whole checkpoint above and below it."""
    totals = summary.totals()
    print_lines(_headline(summary))
    if summary.layers:
        rows = (_row(layer.name, layer.shape_text, layer.to_dict()) for layer in summary.layers)
        totals_row = totals | {"file_bytes": sum(layer.file_bytes for layer in summary.layers)}
        columns = ["layer", ">shape", ">weights", ">A", ">B", ">density", ">backward", ">MiB in files", ">in training"]
        print_table(columns, rows, [_row("all of them", "", totals_row)])
        print_lines(
            f"{totals['nonzero_parameters']:,} of {totals['parameters']:,} parameters are used by the forward pass; "
            "what is not in the table is dense."
        )
    else:
        print_lines(f"{summary.parameters:,} parameters. It is an ordinary dense checkpoint: no file of hf_topkast.")
        print_lines("Matrices may hold zeros all the same; --count-zeros reads and counts them.")
    for name, size in summary.files.items():
        print_lines(f"{mebibytes(size):>12} MiB  {name}")
    if summary.settings:
        print_lines("settings: " + ", ".join(f"{key}={value}" for key, value in told(summary.settings).items()))


def _headline(summary: CheckpointSummary) -> str:
    if summary.settings is None:
        return f"{summary.name}: {summary.kind}"
    return f"{summary.name}: {summary.kind}, method {summary.settings.get('method', 'topkast')}, step {summary.step:,}"


def _row(name: str, shape: str, counts: dict) -> list[str]:
    return [
        *(name, shape),
        *(f"{counts[key]:,}" for key in ("weights", "active", "stored")),
        *(share(counts[key]) for key in ("density", "backward_density")),
        *(mebibytes(counts[key]) for key in ("file_bytes", "training_bytes")),
    ]


def told(settings: dict) -> dict:
    """The settings that say something: neither empty nor `None`."""
    return {key: value for key, value in settings.items() if value not in (None, [], {}, "") and key != "quant_method"}
