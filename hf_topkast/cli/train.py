"""`hf-topkast train`: the recipes, for whoever installed the package without a clone of its repository."""

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .output import AsJson, print_json, print_lines, print_table


# Folders beside the configurations that hold something else: settings of accelerate, and of recipes/sweep.py.
OTHER_FOLDERS = ("accelerate", "paper")


def train(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of one that came with the package (--list).")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="For conversations, through TRL: see finetune/chat.")] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="List the configurations that came with the package.")
    ] = False,
    fields: Annotated[bool, typer.Option("--fields", help="List all fields that there are.")] = False,
    as_json: AsJson = False,
):
    """
    Train a language model, sparse or dense, as a configuration says; `--field value` after it changes its fields.

    The output directory then holds the model, results.json, a model card, and checkpoints to resume from.

    Examples:

        hf-topkast train enwik8/demo

        hf-topkast train enwik8/cpu/topkast_80_60 --data_file text.txt --dataset text --output_dir runs/mine

        hf-topkast train my.yaml --resume

        accelerate launch --num_processes 2 -m hf_topkast train my.yaml
    """
    if listed:
        _print_list(as_json)
        return
    if fields:
        _script(chat).main(["--help"])
    if config is None:
        raise ValueError("train needs a configuration: a YAML file, or a name that hf-topkast train --list shows.")
    argv = [str(find_config(config)), *context.args]
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        results = _script(chat).main(argv)
    if as_json and os.environ.get("RANK", "0") == "0":
        print_json(results)


def recipes_folder() -> Path:
    """Where the recipes are: in the installed package, or, of a clone that is used in place, beside it."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def configurations() -> dict[str, str]:
    """What each configuration that came with the package is for, by its name."""
    folder = recipes_folder()
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        if name.parts[0] not in OTHER_FOLDERS:
            with path.open(encoding="utf-8") as file:
                found[name.with_suffix("").as_posix()] = file.readline().lstrip("# ").strip()
    return found


def find_config(config: str) -> Path:
    """
    The YAML file that is meant: one that is there, or one of the package's, with or without `recipes/` and `.yaml`.

    Raises:
        ValueError: if there is none.
    """
    if config.startswith("-"):
        raise ValueError(f"Give the configuration first, then {config} and whatever else is to be changed in it.")
    path = Path(config)
    if path.is_file():
        return path
    packaged = recipes_folder() / path.as_posix().removeprefix("recipes/")
    for each in (packaged, packaged.with_name(f"{packaged.name}.yaml")):
        if each.is_file():
            return each
    raise ValueError(f"There is no file {config}, and none of that name came with the package: see train --list.")


def _script(chat: bool):
    """The recipe's module. Its parts import each other by their bare names, as those of a script do."""
    sys.path.insert(0, str(recipes_folder()))
    try:
        return importlib.import_module("run_sft" if chat else "run_clm")
    except ModuleNotFoundError as error:
        extra = "chat" if chat else "recipes"
        raise ImportError(f"train needs {error.name}: pip install 'hf-topkast[{extra}]'.") from error


def _print_list(as_json: bool):
    found = configurations()
    if as_json:
        print_json({"folder": str(recipes_folder()), "configurations": found})
        return
    print_table(["configuration", "what it is"], found.items())
    print_lines(f"They lie in {recipes_folder()}.")
