"""
A table of crossovers measured on this machine: one file in the cache directory, used in place of the built-in table.

`hf-topkast calibrate` writes it. It counts for the CPU and the kernels that it was measured with.
"""

import datetime
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from ..checks import number
from .crossovers import DTYPES, PRODUCTS, TOKENS, Crossovers


PATH = Path(HF_HOME) / "hf_topkast" / "crossover.json"

WAY_OUT = "Delete the file, or measure anew: hf-topkast calibrate."


def contents(crossovers: Crossovers, kind: str, isa: str) -> dict[str, Any]:
    """
    What stands in the file.

    Args:
        crossovers (`Crossovers`): a density for each dtype, product and number of tokens.
        kind (`str`): of CPU, a key of `CROSSOVERS`.
        isa (`str`): the instruction set of the kernels.
    """
    return {
        "cpu": processor(),
        "kind": kind,
        "isa": isa,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "tokens": TOKENS,
        "crossovers": crossovers,
    }


def write(content: dict[str, Any], path: Path | None = None):
    """Writes the file, whole or not at all; `content` is what [`contents`] gives, `path` its place, `PATH`."""
    path = PATH if path is None else path
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path, kind: str, isa: str) -> tuple[Crossovers, str] | None:
    """
    The table of the file and when and how it was measured, or `None` if there is no such file.

    Raises:
        ValueError: if the file is damaged, or of another CPU or instruction set; the message says what to do.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}). {WAY_OUT}") from error
    try:
        content = json.loads(text)
        place = content["cpu"], content["kind"], content["isa"]
        origin = f"with {content['threads']} threads and torch {content['torch']}, {content['date']}"
        crossovers = _checked(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no table for this version ({error!r}). {WAY_OUT}") from error
    here = processor(), kind, isa
    if place != here:
        raise ValueError(f"{path} was measured on {_named(place)}; this is {_named(here)}. {WAY_OUT}")
    return crossovers, origin


def _named(place: tuple[str, str, str]) -> str:
    return "{} as '{}' with kernels for {}".format(*place)


def _checked(content: dict[str, Any]) -> Crossovers:
    """The file's table, with a number from 0 to 1 in each place that the built-in ones have."""
    if content["tokens"] != list(TOKENS):
        raise ValueError(f"tokens={content['tokens']!r}, not {list(TOKENS)}")
    table: Crossovers = {dtype: {} for dtype in DTYPES}
    for dtype, product in itertools.product(DTYPES, PRODUCTS):
        row = content["crossovers"][dtype][product]
        if len(row) != len(TOKENS) or not all(0 <= number(density) <= 1 for density in row):
            raise ValueError(f"{product}, {dtype}: {row!r}, not {len(TOKENS)} numbers from 0 to 1")
        table[dtype][product] = tuple(row)
    return table


def processor() -> str:
    """The CPU's name, on Linux with family and model, for virtual machines give one name to many."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            # Up to the empty line behind the first of them: of hundreds the file takes long to read.
            parts = [line.partition(":") for line in itertools.takewhile(str.strip, lines)]
    except OSError:  # not Linux
        parts = []
    first = {key.strip(): value.strip() for key, _, value in parts}
    if "model name" in first:
        return f"{first['model name']} (family {first.get('cpu family')}, model {first.get('model')})"
    return platform.processor() or platform.machine()
