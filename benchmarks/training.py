"""
Real training: recipes shortened to minutes, one after another at equal steps, in one table of bits per byte.

    python -m benchmarks.training --device cuda --data-file wiki.txt --folder runs/short --json runs/short.json

A run is the name of a recipe, with `:16` for blocks of 16×16. All have the steps, learning rate and seed that the
command line says; the rate is not tuned, so differences of a few hundredths mean nothing. Each run is a process of its
own under `accelerate launch`; one that fails, or takes more than `--limit` seconds, is left out. Evaluation is on the
first megabyte of each held-out split.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from .measure import make_parser, report


ROOT = Path(__file__).parents[1]
RUNS = ["dense", "small_dense", "topkast_80_60", "topkast_90_80", "topkast_95_90"]
RUNS += ["topkast_80_60:16", "topkast_80_60:32"]
LAUNCHERS = {"cuda": "single_gpu", "cpu": "cpu"}


def command(run: str, output: Path, args: argparse.Namespace) -> list[str]:
    """The command line of one run."""
    recipe, _, block_size = run.partition(":")
    options = {
        "dataset": "text",
        "data_file": args.data_file,
        "max_eval_bytes": args.eval_bytes,
        "max_steps": args.steps,
        "warmup_steps": args.steps // 10,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "sample_tokens": 0,
        "output_dir": output,
        **({"block_size": block_size} if block_size else {}),
    }
    launcher = ROOT / "recipes/accelerate" / f"{LAUNCHERS[args.device]}.yaml"
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)),
        *(str(ROOT / "recipes/run_clm.py"), str(args.recipes / f"{recipe}.yaml")),
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]


def train(run: str, args: argparse.Namespace) -> dict | None:
    """One row of the table; `None` if the run failed or was given up."""
    output = args.folder / run.replace(":", "-blocks-")
    process = subprocess.Popen(command(run, output, args), start_new_session=True)
    try:
        status = process.wait(args.limit)
    except subprocess.TimeoutExpired:
        status = f"more than {args.limit} seconds"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and what it launched
            process.wait()
    if status:
        print(f"{run}: left out ({status})", file=sys.stderr)
        return None
    results = json.loads((output / "results.json").read_text())
    return {
        "run": run,
        "steps": results["steps"],
        "valid": results["valid_bits_per_byte"],
        "test": results["test_bits_per_byte"],
        "non-zeros": results["nonzero_parameters"],
        "state MB": results["peak_state_bytes"] / 1e6,
        "train seconds": results["train_seconds"],
    }


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--data-file", type=Path, required=True, help="text, of which the last tenth is held out")
    parser.add_argument("--folder", type=Path, required=True, help="for the models and results")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes/enwik8", help="default: %(default)s")
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval-bytes", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=530, help="seconds for a run")
    args = parser.parse_args()
    rows = [row for run in args.runs if (row := train(run, args))]
    if rows:
        report(rows, args, ["valid", "test"])
    if len(rows) < len(args.runs):
        sys.exit(f"{len(args.runs) - len(rows)} of {len(args.runs)} runs did not come to their end, as said above.")


if __name__ == "__main__":
    main()
