"""The files of a checkpoint, in a directory or on the hub, opened by their headers."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..headers import (
    INDEX_NAME,
    READABLE_VERSIONS,
    STATE_NAME,
    WEIGHTS_NAME,
    FileHeader,
    TensorHeader,
    read_header,
)


# Weights that `save_pretrained(..., variant=...)` writes.
VARIANT = re.compile(r"model\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")


class Checkpoint(NamedTuple):
    """
    What a checkpoint's files say, none of their numbers read.

    Attributes:
        name (`str`): the directory, or the name on the hub.
        weights (`list[FileHeader]`): the files of the model's weights.
        state (`FileHeader`, *optional*): our file, which only a sparse checkpoint has.
    """

    name: str
    weights: list[FileHeader]
    state: FileHeader | None

    def find(self, tensor: str) -> FileHeader | None:
        """The file of the weights that has a tensor of this name; `None` if none has."""
        return next((file for file in self.weights if tensor in file.tensors), None)

    def tensors(self) -> Iterable[tuple[str, TensorHeader]]:
        """The tensors of the model's weights, file by file."""
        return (entry for file in self.weights for entry in file.tensors.items())


def open_checkpoint(name: str) -> Checkpoint:
    """
    Opens a directory that `save_pretrained` wrote, or a name on the hub, of which only small files and headers are
    fetched.

    Raises:
        ValueError: if there is no such directory, no model in it that can be read, or a state file of another version
            of the format.
    """
    path = Path(name)
    if path.is_dir():
        return _opened(name, {file.name for file in path.iterdir()}, path, lambda file: read_header(path / file))
    if path.exists():
        raise ValueError(f"{name} is a file: give the directory that it lies in.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no directory {name}.")
    from .hub import fetch_headers  # slow to import

    files, folder, read = fetch_headers(name)
    return _opened(name, files, folder, read)


def _opened(name: str, files: set[str], folder: Path, read: Callable[[str], FileHeader]) -> Checkpoint:
    if WEIGHTS_NAME in files:  # which readers prefer to an index
        shards = [WEIGHTS_NAME]
    elif INDEX_NAME in files:
        shards = _shards(folder / INDEX_NAME)
    else:
        raise ValueError(f"{name} has no {WEIGHTS_NAME}: {_instead(name, files)}")
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise ValueError(f"{name} lacks {missing[0]}, which its {INDEX_NAME} names: copy all files of the checkpoint.")
    return Checkpoint(name, [read(shard) for shard in shards], _state(read) if STATE_NAME in files else None)


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}): copy it anew, or use another checkpoint.") from error


def _state(read: Callable[[str], FileHeader]) -> FileHeader:
    state = read(STATE_NAME)
    version = state.metadata.get("format_version")
    if version not in READABLE_VERSIONS:
        raise ValueError(
            f"{state.path} has format version {version!r}, and this version of hf_topkast reads "
            f"{' and '.join(READABLE_VERSIONS)}. Install the version that wrote it."
        )
    return state


def _instead(name: str, files: set[str]) -> str:
    """The way out for a directory without a model in safetensors files."""
    runs = sorted((file for file in files if file.startswith("checkpoint-")), key=lambda file: (len(file), file))
    if runs:
        return f"give one of the checkpoints in it, such as {Path(name) / runs[-1]}."
    if "adapter_model.safetensors" in files:
        return "it holds adapters of PEFT, and what is sparse is the model that they are for."
    variants = sorted(found[1] for found in map(VARIANT.fullmatch, files) if found)
    if variants:
        return (
            f'its weights are of variant "{variants[0]}". Load it with from_pretrained(..., '
            f'variant="{variants[0]}") and save it anew without.'
        )
    if any(file.endswith(".bin") for file in files):
        return "its weights are pickled. Load it with from_pretrained and save it anew, which writes safetensors."
    return "give a directory that save_pretrained or Trainer has written."
