"""The command line: `hf-topkast inspect | densify | export | plot`."""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

from .checkpoints import export_sparse
from .plots import plot_metric
from .report import sparsity_report
from .surgery import densify


def main(argv: list[str] | None = None):
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): the words after `hf-topkast`; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="hf-topkast", description="Look at and convert sparse checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("inspect", help="print what is sparse in a checkpoint, layer by layer")
    command.add_argument("checkpoint", help="a directory written by save_pretrained, or a hub name")
    command.set_defaults(run=lambda args: print(sparsity_report(_load(args.checkpoint))))

    command = commands.add_parser("densify", help="write a checkpoint as an ordinary dense one")
    command.add_argument("checkpoint", help="a directory written by save_pretrained, or a hub name")
    command.add_argument("output", help="the directory to write")
    command.set_defaults(run=lambda args: densify(_load(args.checkpoint)).save_pretrained(args.output))

    command = commands.add_parser("export", help="write a checkpoint in the compact form")
    command.add_argument("checkpoint", help="a directory written by save_pretrained, or a hub name")
    command.add_argument("output", help="the directory to write")
    command.set_defaults(run=lambda args: export_sparse(_load(args.checkpoint), args.output))

    command = commands.add_parser("plot", help="draw a logged metric of one or more runs")
    command.add_argument("runs", nargs="+", help="output directories of Trainer")
    command.add_argument("--metric", default="topkast/mask_churn", help="logged key (default: %(default)s)")
    command.add_argument("--output", default="plot.png", help="image to write (default: %(default)s)")
    command.set_defaults(
        run=lambda args: plot_metric({Path(run).name: run for run in args.runs}, args.metric, args.output)
    )
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, ImportError, OSError) as error:  # bad input, said in one line
        parser.exit(2, f"hf-topkast: {error}\n")


def _load(checkpoint: str):
    return AutoModelForCausalLM.from_pretrained(checkpoint)
