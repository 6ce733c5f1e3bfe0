"""How checkpoints outlive a killed process or a full disk: atomic writes, and telling whole directories from parts."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Gives a temporary name beside `path` to write to, and renames it to `path` once it is safely on disk.

    Whatever happens meanwhile, `path` is what it was or what it becomes, never a part of it.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: str | os.PathLike[str]) -> None:
    """Waits until a file, or the names in a directory, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(directory: str | os.PathLike[str]) -> None:
    """Waits until everything in a directory is on disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            flush(os.path.join(folder, name))
        flush(folder)


def is_whole(checkpoint: str | os.PathLike[str]) -> bool:
    """
    Whether a checkpoint directory of Trainer was written to its end: `trainer_state.json` comes last, so a directory
    without a readable one was left half-written.
    """
    try:
        state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "global_step" in state


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """
    The checkpoint directory of the highest step that is whole, with a warning for each later one that is not.

    Args:
        output_dir (`str` or `os.PathLike`): where Trainer writes its checkpoints.

    Returns:
        `str`, *optional*: its path; `None` if there is none.
    """
    steps: dict[int, Path] = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdigit() and path.is_dir():
            steps[int(number)] = path
    for step in sorted(steps, reverse=True):
        if is_whole(steps[step]):
            return str(steps[step])
        logger.warning(
            f"{steps[step]} is incomplete: the run that wrote it was stopped meanwhile. It is skipped, and will be "
            "written again when training comes to its step."
        )
    return None
