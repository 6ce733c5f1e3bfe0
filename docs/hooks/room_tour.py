"""A tour of the package's rooms, in the words of their own docstrings."""

import ast
from pathlib import Path

import hf_topkast


PACKAGE = Path(hf_topkast.__file__).parent
# From what a user calls down to what all stand on, as imports go.
ROOMS = ("cli", "runs", "training", "checkpoints", "surgery", "sets", "layers", "ops", "storage", "native")


def tour() -> str:
    """Each room with what it says of itself, and each of its files with its first sentence."""
    lines = []
    for room in ROOMS:
        lines += [
            f"### `{room}/`",
            "",
            _docstring(PACKAGE / room / "__init__.py").replace("[`", "`").replace("`]", "`"),
        ]
        files = [path for path in sorted((PACKAGE / room).glob("*.py")) if path.stem != "__init__"]
        entries = [f"- `{path.name}`: {_docstring(path).split(chr(10) * 2)[0]}".replace("\n", " ") for path in files]
        lines += ["", '??? abstract "Its files"', "", *(f"    {entry}" for entry in entries), ""]
    return "\n".join(lines)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
