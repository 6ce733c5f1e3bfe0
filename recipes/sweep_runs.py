"""One run of a sweep as a directory and as a process: whether it is done, starting it, and what it leaves."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from sweep_plan import Run, Sweep
from sweep_yaml import dump_yaml, load_yaml

from hf_topkast.checkpoints import last_whole_checkpoint


SCRIPT = Path(__file__).with_name("run_clm.py")
LOG_LINES = 15  # of a failed run's log, to print


@dataclass
class Child:
    """A run as a process."""

    run: Run
    process: subprocess.Popen
    started: float


def start(run: Run, threads: int) -> Child | None:
    """
    Starts a run or resumes it; `None` if it is done meanwhile or another process runs it.

    The lock on its directory belongs to the run and not to the runner: a run that outlives a killed runner keeps it.
    """
    lock = take_lock(run)
    if lock is None:
        return None
    try:
        if is_done(run):
            return None
        refuse_other_settings(run)
        config = run.folder / "config.yaml"
        temporary = config.with_suffix(".tmp")
        temporary.write_text(dump_yaml(run.settings), encoding="utf-8")
        os.replace(temporary, config)
        command = [sys.executable, str(SCRIPT), str(config)]
        if last_whole_checkpoint(run.folder):
            command.append("--resume")
        count = str(threads)
        environment = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=[lock]
            )
        return Child(run, process, time.monotonic())
    finally:
        os.close(lock)


def take_lock(run: Run) -> int | None:
    """The locked lock file of a run's directory; `None` if another process has it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(run.folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def is_running(run: Run) -> bool:
    """Whether a process, of this runner or another, is at work on a run."""
    lock = take_lock(run)
    if lock is not None:
        os.close(lock)
    return lock is None


def is_done(run: Run) -> bool:
    """Whether a run has its results; they are written last, and whole or not at all."""
    return (run.folder / "results.json").exists()


def tidy(run: Run, sweep: Sweep) -> None:
    """Removes the weights and checkpoints of a finished run."""
    if sweep.keep_models:
        return
    for checkpoint in run.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)  # another runner may be at it; the next start tries again
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for path in run.folder.glob(pattern):
            path.unlink(missing_ok=True)


def refuse_other_settings(run: Run) -> None:
    """Raises a `ValueError` if a directory holds the results, or part of a run, of other settings."""
    path = run.folder / "config.yaml"
    if not path.exists() or not (is_done(run) or last_whole_checkpoint(run.folder) or is_running(run)):
        return
    then = load_yaml(path)
    differing = sorted(
        key
        for key in {*then, *run.settings} - {"output_dir"}  # the whole sweep may have been moved
        if then.get(key) != run.settings.get(key)
    )
    if differing:
        changes = "; ".join(f"`{key}` was {then.get(key)!r}, is {run.settings.get(key)!r}" for key in differing)
        raise ValueError(
            f"`{run.folder}` holds a run of other settings: {changes}. Remove the directory to run it anew, give the "
            "settings of then, or another `output_dir` (--set output_dir=DIR)."
        )


def describe_failure(child: Child) -> str:
    """How a run ended, and the last lines of its log."""
    code = child.process.returncode
    how = f"killed by signal {-code}" if code < 0 else f"exit status {code}" if code else "without results"
    path = child.run.folder / "log.txt"
    with path.open(encoding="utf-8", errors="replace") as log:
        last = "".join(f"    {line}" for line in deque(log, LOG_LINES)).rstrip()
    return f"{how}; the last lines of {path}:\n{last}"
