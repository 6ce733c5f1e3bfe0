"""`topkast_layers.jsonl` in a run's output directory: what each sparse layer did over the steps, a line an entry."""

import json
import os
from pathlib import Path
from typing import Any


LAYERS_NAME = "topkast_layers.jsonl"


def append_entry(directory: str | os.PathLike, step: int, layers: dict[str, dict[str, float]]):
    """Adds what was seen after an optimizer step: numbers by their names, by layer."""
    with Path(directory, LAYERS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "layers": layers}) + "\n")


def read_layers(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """
    The entries of a run by step, each `{"step": s, "layers": {name: {"density": …, …}}}`; none if there is no file.

    The last entry of a step counts, and what a killed run left unfinished at the end of the file does not.
    """
    path = Path(directory, LAYERS_NAME)
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    entries = {entry["step"]: entry for entry in map(json.loads, whole.splitlines())}
    return [entries[step] for step in sorted(entries)]


def forget_after(directory: str | os.PathLike, step: int):
    """Drops the entries of later steps, which come again in a run that begins, or resumes, at `step`."""
    path = Path(directory, LAYERS_NAME)
    if not path.exists():
        return
    kept = [json.dumps(entry) + "\n" for entry in read_layers(directory) if entry["step"] <= step]
    temporary = path.with_name(f"{LAYERS_NAME}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
