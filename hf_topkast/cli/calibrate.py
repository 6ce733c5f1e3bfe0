"""`hf-topkast calibrate`: the table by which layers choose between sparse and dense products, measured here."""

from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .output import AsJson, console, print_json, print_lines, print_table


def calibrate(
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads to measure with; torch's number by default.")
    ] = None,
    shapes: Annotated[list[str], typer.Option("--shape", help="Of a layer, OUTxIN; may be given several times.")] = (
        "768x768",
        "2048x2048",
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of timings at most.")] = 15,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and leave what is in use as it is.")] = False,
    as_json: AsJson = False,
):
    """
    Measure from which density on this CPU multiplies faster through a dense weight, and use that from now on.

    Takes about four minutes; let the machine do nothing else, and bind the threads. The table is one file in the cache
    directory of Hugging Face, for this CPU and user: delete it to go back to the built-in one.

    Examples:

        OMP_PROC_BIND=true hf-topkast calibrate --threads 2

        hf-topkast calibrate --shape 1024x1024 --shape 4096x1024 --dry-run --json
    """
    sizes = [parse_shape(shape) for shape in shapes]
    import torch

    from ..ops import BACKENDS, WHY_NO_CPU, measured
    from ..ops.costs import KIND

    if "cpu" not in BACKENDS:
        raise ValueError(f"There is nothing to measure: hf_topkast runs without its C++ kernels ({WHY_NO_CPU}).")
    from ..ops.measuring import ENTRIES, measure_table  # which needs the kernels

    if threads is not None:
        torch.set_num_threads(threads)
    if not dry_run:  # rather fail here than after minutes
        measured.PATH.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(error=True)) as progress:
        task = progress.add_task("measuring", total=ENTRIES)
        table = measure_table(
            sizes,
            rounds,
            lambda dtype, product, tokens, density: progress.update(
                task, advance=1, description=f"{dtype} {product}, {tokens}"
            ),
        )
    contents = measured.contents(table, KIND, BACKENDS["cpu"].isa)
    if not dry_run:
        measured.write(contents)
    if as_json:
        print_json({**contents, "file": None if dry_run else str(measured.PATH)})
        return
    print_lines(
        f"{contents['cpu']}, kernels for {contents['isa']}, {contents['threads']} threads, torch {contents['torch']}",
        "Up to this density the sparse kernels are faster, by tokens:",
    )
    rows = (
        (dtype, product, *(f"{density:g}" for density in row))
        for dtype, products in table.items()
        for product, row in products.items()
    )
    print_table(["dtype", "product", *(f">{tokens}" for tokens in contents["tokens"])], rows)
    print_lines("not written" if dry_run else f"written to {measured.PATH}: delete it to use the built-in table again")


def parse_shape(text: str) -> tuple[int, int]:
    """
    `768x3072` as two numbers.

    Raises:
        ValueError: if it is not of this form.
    """
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"--shape {text} is not a shape: give OUTxIN, such as 768x3072.")
    return int(sides[0]), int(sides[1])
