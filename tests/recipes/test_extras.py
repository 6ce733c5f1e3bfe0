"""What `pip install 'hf-topkast[recipes]'` and `[chat]` bring is what the recipes import."""

import ast
import re
import sys
from pathlib import Path

import arguments
import pytest


tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or later reads TOML by itself")
RECIPES = Path(arguments.__file__).parent
PROJECT = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text())["project"]
NAMES = {"pyyaml": "yaml"}  # of packages whose module is called otherwise
OF_TRANSFORMERS = {"huggingface_hub", "tokenizers", "tqdm"}


def modules_of(requirements):
    """Top-level modules of a list of requirements, those of our own extras included."""
    found = set()
    for requirement in requirements:
        name, extra = re.match(r"([\w-]+)(?:\[(\w+)\])?", requirement).groups()
        if name == PROJECT["name"]:
            found |= modules_of(PROJECT["optional-dependencies"][extra])
        else:
            found.add(NAMES.get(name, name))
    return found


def imported_by(path):
    """Top-level modules that are neither Python's, nor ours, nor beside the file."""
    tree = ast.walk(ast.parse(path.read_text()))
    found = {
        name.partition(".")[0]
        for node in tree
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    beside = {other.stem for other in RECIPES.glob("*.py")}
    return found - set(sys.stdlib_module_names) - beside - {"hf_topkast"}


def test_extras_hold_what_the_recipes_import():
    installed = modules_of(PROJECT["dependencies"]) | OF_TRANSFORMERS
    extras = {"run_sft.py": "chat"}
    for path in RECIPES.glob("*.py"):
        extra = modules_of(PROJECT["optional-dependencies"][extras.get(path.name, "recipes")])
        assert imported_by(path) <= installed | extra, path.name
    assert "trl" in imported_by(RECIPES / "run_sft.py") - installed
