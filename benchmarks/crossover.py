"""
Up to which density the sparse kernels are faster than dense products through an expanded α, on this CPU.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.crossover --threads 2 --write

Prints a table as it stands in `hf_topkast/ops/crossovers.py`: for each dtype, product and number of tokens the density
at which the two ways take equal time, the smallest one over the shapes, between the neighbours of a grid by
interpolation. `--write` puts it into the cache directory, where `hf_topkast` finds it from its next import on. This
takes about four minutes.

An AVX-512 machine measures as one that has AVX2 alone with

    HF_TOPKAST_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
"""

import copy
import functools
import json
import time
import timeit
from collections.abc import Callable, Iterator

import torch

from hf_topkast.checkpoints.durable import replacing
from hf_topkast.ops import cpu, expanded, measured
from hf_topkast.ops.costs import KIND
from hf_topkast.ops.crossovers import DTYPES, PRODUCTS, TOKENS

from .kernels import Problem
from .measure import interleaved, machine, make_parser, median_ratio


DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.9)
# Seconds for the timings of a pair of ways: large products, which vary less, are timed only a few times …
BUDGET = 0.4
FEWEST_ROUNDS = 3
# … and once where a pair takes so many seconds.
LONG = 2
# A crossover that takes so many seconds to find is kept for more tokens: without AVX-512 torch multiplies bf16 up to a
# hundred times as slowly as fp32.
PATIENCE = 30


def crossover(ratio: Callable[[float], float]) -> float:
    """
    Where expanded time over sparse time falls below 1, found in DENSITIES by halving: a density, 1 for never.

    Args:
        ratio (`Callable[[float], float]`): measures it at a density.
    """
    ratios: dict[int, float] = {}
    low, high = -1, len(DENSITIES)
    while high - low > 1:
        middle = (low + high) // 2
        ratios[middle] = ratio(DENSITIES[middle])
        low, high = (middle, high) if ratios[middle] >= 1 else (low, middle)
    if low < 0:
        return 0.0
    if high == len(DENSITIES):
        return 1.0
    share = (ratios[low] - 1) / (ratios[low] - ratios[high])
    return DENSITIES[low] + (DENSITIES[high] - DENSITIES[low]) * share


class Layer:
    """A layer at any density, made when it is first asked for, with inputs of as many tokens as are measured."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype):
        self.x, self.dy = (torch.randn(max(TOKENS), features).to(dtype) for features in reversed(shape))
        self.problem = functools.cache(lambda density: Problem(shape, 1, density, 1.0, dtype))

    def ratio(self, product: str, tokens: int, rounds: int, density: float) -> float:
        """Expanded time over sparse time."""
        problem = copy.copy(self.problem(density))
        problem.x, problem.dy = self.x[:tokens], self.dy[:tokens]
        runs = {"sparse": problem.backend(cpu)[product], "expanded": problem.backend(expanded)[product]}
        once = {name: timeit.timeit(run, number=1) for name, run in runs.items()}
        pair = sum(once.values())
        if pair > LONG:
            return once["expanded"] / once["sparse"]
        seconds = interleaved(runs, min(rounds, max(FEWEST_ROUNDS, int(BUDGET / pair))))
        return median_ratio(seconds["expanded"], seconds["sparse"])


def measure(shapes: list[tuple[int, int]], dtype: str, rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Each product with its crossovers at TOKENS, the smallest over the shapes."""
    layers = [Layer(shape, getattr(torch, dtype)) for shape in shapes]
    for product in PRODUCTS:
        row: list[float] = []
        seconds = 0.0
        for tokens in TOKENS:
            if seconds <= PATIENCE:
                start = time.perf_counter()
                limit = min(crossover(functools.partial(layer.ratio, product, tokens, rounds)) for layer in layers)
                seconds = time.perf_counter() - start
            row.append(round(limit, 2))
        yield product, row


def main():
    """Prints the table, and writes it if asked."""
    parser = make_parser(__doc__, devices=("cpu",))
    parser.add_argument("--shapes", nargs="+", default=["768x768", "2048x2048"], help="out x in")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of timings at most; default: %(default)s")
    parser.add_argument("--write", action="store_true", help=f"use it on this machine: write {measured.PATH}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.write:  # rather fail here than after minutes
        measured.PATH.parent.mkdir(parents=True, exist_ok=True)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    print("# " + ", ".join(f"{key} {value}" for key, value in machine().items()))
    crossovers = {}
    print(f'"{KIND}": {{')
    for dtype in DTYPES:
        crossovers[dtype] = {}
        print(f'    "{dtype}": {{')
        for product, row in measure(shapes, dtype, arguments.rounds):
            crossovers[dtype][product] = row
            print(f'        "{product}": ({", ".join(f"{density:g}" for density in row)}),', flush=True)
        print("    },")
    print("},")
    text = json.dumps(measured.contents(crossovers, KIND, cpu.isa), indent=1) + "\n"
    if arguments.write:
        with replacing(measured.PATH) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"# written to {measured.PATH}: delete it to use the built-in table again")
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
