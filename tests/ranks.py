"""Real runs of several processes for tests: `launch` starts one process per rank, on this machine's CPU."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path


WORKERS = Path(__file__).with_name("rank_workers.py")

# What `accelerate launch --use_fsdp --fsdp_version 2 ...` puts into the environment.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "GPT2Block",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


class Run:
    """The processes of one run."""

    def __init__(self, worker: str, ranks: int, engine: str, arguments: dict):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {**os.environ, "OMP_NUM_THREADS": "1"}
        common["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        if ranks > 1:
            common.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if engine.startswith("fsdp"):
            common.update(FSDP, ACCELERATE_TORCH_DEVICE="cpu")  # see `rank_workers.pass_for_gpus`
        else:
            common["ACCELERATE_USE_CPU"] = "true"
        if engine == "fsdp-sharded":
            common["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKERS), worker, json.dumps(arguments)],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else common,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def wait(self, timeout: float = 300) -> list[tuple[int, str]]:
        """Exit status and standard error of each rank; those that hang are killed."""
        killer = threading.Timer(timeout, lambda: [process.kill() for process in self.processes])
        killer.start()
        errors = [process.communicate()[1] for process in self.processes]
        killer.cancel()
        return [(process.returncode, error) for process, error in zip(self.processes, errors)]


def launch(worker: str, ranks: int = 2, engine: str = "ddp", **arguments):
    """
    Runs `rank_workers.<worker>(**arguments)` on every rank, and fails where one fails.

    Args:
        worker (`str`): a function of `rank_workers.py`.
        ranks (`int`): processes.
        engine (`str`): `"ddp"`, `"fsdp"` (full state dicts) or `"fsdp-sharded"`.
        arguments: JSON types.
    """
    for rank, (status, error) in enumerate(Run(worker, ranks, engine, arguments).wait()):
        assert status == 0, f"rank {rank}: {error[-3000:]}"
