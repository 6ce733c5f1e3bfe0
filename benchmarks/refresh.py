"""
A refresh on a CPU: with the C++ passes, with torch's operations alone, and beside one `numpy.partition` of as many
float32 numbers, in one process.

    python -m benchmarks.refresh [--shapes 4096x4096 768x3072] [--layers 4] [--bf16] [--method topkast] [--threads 1]

Rounds are interleaved, with new gradients and an AdamW step before each refresh; times are medians over the rounds, in
nanoseconds a weight and in seconds for all layers, ratios medians of the ratios in one round. Memory is what a refresh
takes at its peak beyond what was there before it, in bytes a weight, each side in a process of its own (Linux). The
last column says whether both sides have the same weights, sets and optimizer state in the end, bit for bit.
"""

import argparse
import contextlib
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hf_topkast import TopKastController, sparsify
from hf_topkast.native import extension, torch_only

from .measure import make_parser, median_ratio, report


SIDES = {"C++": contextlib.nullcontext, "torch": torch_only}


class Refreshed:
    """A stack of sparse layers in training, whose refresh is done by one side."""

    def __init__(self, args: argparse.Namespace, side: str):
        torch.manual_seed(0)
        self.side = SIDES[side]
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes] * args.layers
        layers = [nn.Linear(columns, rows, bias=False) for rows, columns in shapes]
        self.numel = sum(rows * columns for rows, columns in shapes)
        self.model = nn.Sequential(*layers).to(torch.bfloat16 if args.bf16 else torch.float32)
        settings = {"method": args.method, "density": args.density, "block_size": args.block_size}
        if args.compare is not None:
            settings["compare"] = args.compare
        names = [str(place) for place in range(len(layers))]
        with self.side():
            sparsify(self.model, target_modules=names, exclude_modules=[], **settings)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.controller = TopKastController(self.model, self.optimizer, total_steps=1000)
        self.generator = torch.Generator().manual_seed(1)

    def step(self):
        """Another step of training, with new gradients."""
        for values in self.model.parameters():
            values.grad = torch.randn(values.shape, generator=self.generator).to(values.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def refresh(self) -> float:
        """Seconds of a refresh."""
        with self.side():
            start = time.perf_counter()
            self.controller.refresh()
            return time.perf_counter() - start

    def numbers(self) -> list[torch.Tensor]:
        """All that is stored."""
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return [*self.model.state_dict().values(), *states]


def bytes_at_refresh(args: argparse.Namespace, side: str) -> float:
    """What a refresh takes beyond what stays, bytes a weight, in this process and once."""
    refreshed, least = Refreshed(args, side), math.inf
    for _ in range(3):  # the first one has yet to load and to make what stays
        refreshed.step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what there is
        before = resident("VmRSS")
        refreshed.refresh()
        least = min(least, resident("VmHWM") - before)
    return least / refreshed.numel


def resident(key: str) -> int:
    """Bytes in memory of this process, as Linux has them: `"VmRSS"` now, `"VmHWM"` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main():
    """Prints the table."""
    parser = make_parser(__doc__, devices=("cpu",))
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="rows x columns of layers")
    parser.add_argument("--layers", type=int, default=1, help="of each shape; default: %(default)s")
    parser.add_argument("--method", default="topkast")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--compare", choices=("layer", "row"))
    parser.add_argument("--block-size", nargs=2, type=int, default=[1, 1], help="rows and columns of a block")
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(bytes_at_refresh(args, args.memory_of))
        return
    if extension is None:
        parser.error("There is no C++ extension to compare with: install a compiler and reinstall the package.")

    memory = {side: _memory_of(side) for side in SIDES}
    sides = {side: Refreshed(args, side) for side in SIDES}
    numbers = torch.randn(sides["C++"].numel).abs().numpy()
    seconds: dict[str, list[float]] = {name: [] for name in (*SIDES, "partition")}
    for round_ in range(args.rounds + 1):
        for name, refreshed in sides.items():
            refreshed.step()
            took = refreshed.refresh()
            if round_:  # the first one warms up
                seconds[name].append(took)
        start = time.perf_counter()
        np.partition(numbers, round(len(numbers) * (1 - args.density)))
        if round_:
            seconds["partition"].append(time.perf_counter() - start)
    same = all(torch.equal(*pair) for pair in zip(*(side.numbers() for side in sides.values()), strict=True))
    row = {
        "layers": " ".join(args.shapes) + f" × {args.layers}",
        "weights": "bf16" if args.bf16 else "fp32",
        "block": "{}×{}".format(*args.block_size),
        "method": args.method + (" by row" if args.compare == "row" else ""),
        **{f"{name}, ns": statistics.median(times) / len(numbers) * 1e9 for name, times in seconds.items()},
        "millions": len(numbers) / 1e6,
        **{f"{name}, s": statistics.median(times) for name, times in seconds.items()},
        "torch / C++": median_ratio(seconds["torch"], seconds["C++"]),
        "C++ / partition": median_ratio(seconds["C++"], seconds["partition"]),
        **{f"{side}, bytes": memory[side] for side in SIDES},
        "same bits": str(same),
    }
    report([row], args, ["torch / C++", "C++ / partition"])


def _memory_of(side: str) -> float:
    command = [sys.executable, "-m", "benchmarks.refresh", *sys.argv[1:], "--memory-of", side]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
