"""
Trains with `TopKastTrainer` in lives that are killed at random moments, each resuming where the last one left off.

    python soak.py DIRECTORY KILLS SEED

Half of the lives are killed by the clock, the other half as they open a random one of the files they write; and all
of them after a few steps, so that on a fast machine too training does not end before the last kill. Prints how many
died, how many of them left a half-written checkpoint, and saves the weights where it ended.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from toy_training import make_trainer
from transformers import TrainerCallback

from hf_topkast import TopKastConfig
from hf_topkast.checkpoints.durable import is_whole, last_whole_checkpoint


CONFIG = TopKastConfig(density=0.2, refresh_every=3, exploration_lr_scale=0.5, explore_until=90)
SETTINGS = {"max_steps": 120, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 1000}


class DieAfter(TrainerCallback):
    """Ends the process after so many steps of this life, without a word."""

    def __init__(self, steps: int):
        self.left = steps

    def on_step_end(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def live(directory: Path, die_at_write: int | None = None, die_after: int | None = None):
    """Trains to the end, from the last whole checkpoint if there is one."""
    writes = 0

    def watch(event, arguments):
        nonlocal writes
        if event == "open" and "checkpoint-" in str(arguments[0]) and str(arguments[1]).startswith(("w", "r+")):
            writes += 1
            if writes == die_at_write:
                os.kill(os.getpid(), signal.SIGKILL)

    if die_at_write is not None:
        sys.addaudithook(watch)
    trainer = make_trainer(directory, config=CONFIG, **SETTINGS)
    if die_after is not None:
        trainer.add_callback(DieAfter(die_after))
    trainer.train(resume_from_checkpoint=True if last_whole_checkpoint(directory) else None)
    torch.save(trainer.model.state_dict(), directory / "end.pt")


def main(directory: Path, kills: int, seed: int):
    """Kills as many lives as asked, then lets one live."""
    chance = random.Random(seed)
    died = half_written = 0
    while died < kills and not (directory / "end.pt").exists():
        by_clock = chance.random() < 0.5
        die_at_write = None if by_clock else chance.randrange(1, 25)
        die_after = chance.randrange(3, 7)  # 20 lives: at most 120 steps, less those that were not saved
        child = os.fork()  # the imports above are most of a life's time
        if child == 0:
            live(directory, die_at_write, die_after)
            os._exit(0)
        if by_clock:
            time.sleep(chance.uniform(0.05, 1.0))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        died += os.WIFSIGNALED(status)
        half_written += any(not is_whole(path) for path in directory.glob("checkpoint-*"))
    if not (directory / "end.pt").exists():
        live(directory)
    print(died, half_written)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
