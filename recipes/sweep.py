"""
Runs whatever is not done yet of a set of `run_clm.py` runs, and collects them in a table.

    python recipes/sweep.py SWEEP.yaml [--jobs N] [--only REGEX] [--set field=value ...] [--dry-run]

Stopped in any way, the runner or a run, it goes on where it was when it is started again: what is finished never runs
again, what is half done resumes from its last whole checkpoint. Several runners may work at one sweep at the same time
(one for each GPU, say, with CUDA_VISIBLE_DEVICES). `output_dir` gets `table.md`; the same in numbers,
`table.csv`, a row each, and `runs.csv`, every run; plots; and `ROW/VALUE/seed-S/` with `config.yaml`, `log.txt` and
what `run_clm.py` leaves.

A sweep file:

    output_dir: runs/table5
    base: ../enwik8/dense.yaml     # a file for run_clm.py, relative to this one; its seed and output_dir are not used
    settings: {max_steps: 2000}    # fields for every run, over the base
    rows:                          # a row of the table each: fields over the settings
      dense: {sparse: false, learning_rate: [1e-3, 2e-3, 4e-3]}
      80/60: {density: 0.2, backward_density: 0.4, learning_rate: [2e-3, 4e-3, 8e-3]}
      small dense: {base: ../enwik8/small_dense.yaml, learning_rate: 4e-3}
    grid: {density: [0.2, 0.1]}    # multiplies the rows, but those that give the field themselves; dense rows only by
                                   # fields that are not Top-KAST's or fine-tuning's
    tune: learning_rate            # the field to choose the best value of, on the valid split (this is the default)
    seeds: [0, 1, 2]               # default [0]. All values run with the first seed, the best one with the others too
    seeds_everywhere: false        # true: all values with all seeds, and the best mean is chosen
    seeds_within: 0.03             # values whose first seed comes this close to the best run with the other seeds too,
                                   # and the best mean is chosen; default 0
    keep_models: false             # true: weights and checkpoints of finished runs stay on disk
    like: table5_cpu.yaml          # another sweep file, relative to this one, whose keys count where this has none
    overrides: {max_steps: 12}     # fields that win over the rows, as --set does

`output_dir` and `rows` must be there, the rest may. In `settings`, `rows`, `grid` and `--set` a list means "each of
these"; a field whose value is itself a list is given as a list in a list (`block_size: [[16, 16]]`). Of two mappings,
such as `config_overrides`, the keys are merged. `--set` wins over everything; it takes the keys of the sweep
(`--set output_dir=DIR`) and fields of all runs (`--set dataset=text --set data_file=FILE`).
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from sweep_costs import describe_costs
from sweep_plan import Row, Run, Sweep, metric_of, read_sweep
from sweep_plots import draw_plots
from sweep_runs import Child, describe_failure, is_done, refuse_other_settings, start, tidy
from sweep_tables import read_result, read_results, write_tables
from sweep_yaml import load_yaml


POLL_SECONDS = 0.5


def main(argv: list[str] | None = None) -> int:
    """
    Runs the sweep.

    Args:
        argv (`list[str]`, *optional*): The command line. Defaults to that of the process.

    Returns:
        `int`: 0 if all runs are done, 1 if some failed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sweep", help="YAML file, see above.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at the same time. Default: 1.")
    parser.add_argument("--threads", type=int, help=f"Threads of a run. Default: the {cores} cores here, shared out.")
    parser.add_argument("--only", metavar="REGEX", default="", help="Only rows in whose names this is found.")
    parser.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[], help="Wins over the file.")
    parser.add_argument("--dry-run", action="store_true", help="List the runs and their costs, and run nothing.")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least 1.")

    try:
        only = re.compile(args.only)
    except re.error as error:
        parser.error(f"--only {args.only}: not a regular expression ({error}).")

    sweep = read_sweep(args.sweep, read_overrides(args.set))
    rows = [row for row in sweep.rows if only.search(row.name)]
    if not rows:
        names = ", ".join(row.name for row in sweep.rows)
        raise ValueError(f"--only {args.only}: no row has it in its name. Rows: {names}.")
    finished = read_results(sweep)
    for run in (run for row in sweep.rows for run in sweep.wanted_runs(row, finished)):
        refuse_other_settings(run)
    if args.dry_run:
        print(describe_costs(sweep, rows, finished))
        return 0
    return run_sweep(sweep, rows, args.jobs, args.threads or max(1, cores // args.jobs))


def read_overrides(assignments: list[str]) -> dict[str, Any]:
    """`--set` as a mapping, values in YAML."""
    overrides = {}
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: give FIELD=VALUE.")
        overrides[field] = load_yaml(f"value: {value}", f"--set {assignment}")["value"]
    return overrides


def run_sweep(sweep: Sweep, rows: list[Row], jobs: int, threads: int) -> int:
    """
    Starts runs until none is left, and writes the tables whenever one is done.

    Args:
        sweep ([`Sweep`]): All rows; they are all in the tables.
        rows (`list[Row]`): Those to run.
        jobs (`int`): Runs at the same time.
        threads (`int`): Threads of each.

    Returns:
        `int`: 1 if runs failed, else 0.
    """
    children: list[Child] = []
    failed: dict[Path, str] = {}
    awaited: set[Path] = set()  # those that another process runs
    finished = read_results(sweep)
    for run in (run for row in sweep.rows for run in sweep.wanted_runs(row, finished) if run.folder in finished):
        tidy(run, sweep)
    write_tables(sweep, failed)
    try:
        while True:
            finished = read_results(sweep, finished)
            busy = {child.run.folder for child in children}
            finished = {folder: results for folder, results in finished.items() if folder not in busy}
            wanted = [run for row in rows for run in sweep.wanted_runs(row, finished)]
            for run in [run for run in wanted if run.folder in awaited and run.folder in finished]:
                awaited.remove(run.folder)
                report(sweep, rows, run, None, finished, failed)
            left = [run for run in wanted if run.folder not in {*finished, *failed, *busy}]
            left.sort(key=lambda run: sweep.seeds.index(run.seed))  # all rows with the first seed come first
            if not left and not children:
                break
            for run in left:
                if len(children) == jobs:
                    break
                child = start(run, threads)
                if child is not None:
                    children.append(child)
                    awaited.discard(run.folder)
                elif run.folder not in awaited and not is_done(run):
                    awaited.add(run.folder)
                    print(f"{run.name} is run by another process: waiting for it.", flush=True)
            time.sleep(POLL_SECONDS)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                if is_done(child.run):
                    finished[child.run.folder] = read_result(child.run)
                else:
                    failed[child.run.folder] = describe_failure(child)
                report(sweep, rows, child.run, time.monotonic() - child.started, finished, failed)
    except KeyboardInterrupt:
        for child in children:
            child.process.terminate()
            child.process.wait()
        print("Interrupted. Start it again to go on.", flush=True)
        return 1
    edges = write_tables(sweep, failed)
    draw_plots(sweep, finished)
    if failed:
        print(f"{len(failed)} run(s) failed, see above. They are tried again when this is started again.")
    print(f"Tables: {sweep.output_dir / 'table.md'}")
    if edges:
        print(f"Best {sweep.tune} at an edge of its grid, so add a value beyond it: {', '.join(edges)}")
    return 1 if failed else 0


def report(
    sweep: Sweep,
    rows: list[Row],
    run: Run,
    seconds: float | None,
    finished: dict[Path, dict],
    failed: dict[Path, str],
) -> None:
    """What follows the end of a run: its line, its tidying, the tables."""
    done = sum(r.folder in finished for row in rows for r in sweep.wanted_runs(row, finished))
    place = f"[{done}/{sum(sweep.total_runs(row, finished) for row in rows)}] {run.name}"
    if run.folder in failed:
        print(f"{place}: FAILED, {failed[run.folder]}", flush=True)
    else:
        results = finished[run.folder]
        metric = metric_of(results)
        scores = ", ".join(f"{name} {results[f'{name}_{metric}']:.4f}" for name in ("valid", "test"))
        took = "by another process" if seconds is None else f"{seconds:,.0f} s"
        print(f"{place}: {metric} {scores}, {took}", flush=True)
        tidy(run, sweep)
    write_tables(sweep, failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
