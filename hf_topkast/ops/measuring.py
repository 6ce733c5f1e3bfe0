"""
Measures up to which density the sparse kernels are faster than dense products through an expanded α, on this CPU.

For each dtype, product and number of tokens it is the density at which the two ways take equal time, the smallest one
over the shapes, between the neighbours of a grid by interpolation. Importing it needs the C++ kernels.
"""

import copy
import functools
import time
import timeit
from collections.abc import Callable

import torch

from . import cpu, expanded
from .crossovers import DTYPES, PRODUCTS, TOKENS, Crossovers
from .timing import RandomLayer, interleaved, median_ratio


DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.9)
# Seconds for the timings of a pair of ways: large products, which vary less, are timed only a few times …
BUDGET = 0.4
FEWEST_ROUNDS = 3
# … and once where a pair takes so many seconds.
LONG = 2
# A crossover that takes so many seconds to find is kept for more tokens: without AVX-512 torch multiplies bf16 up to a
# hundred times as slowly as fp32.
PATIENCE = 30

# How many numbers [`measure_table`] finds.
ENTRIES = len(DTYPES) * len(PRODUCTS) * len(TOKENS)


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
        self.at = functools.cache(lambda density: RandomLayer(shape, 1, density, dtype=dtype))

    def ratio(self, product: str, tokens: int, rounds: int, density: float) -> float:
        """Expanded time over sparse time."""
        layer = copy.copy(self.at(density))
        layer.x, layer.dy = self.x[:tokens], self.dy[:tokens]
        runs = {"sparse": layer.products(cpu)[product], "expanded": layer.products(expanded)[product]}
        once = {name: timeit.timeit(run, number=1) for name, run in runs.items()}
        pair = sum(once.values())
        if pair > LONG:
            return once["expanded"] / once["sparse"]
        seconds = interleaved(runs, min(rounds, max(FEWEST_ROUNDS, int(BUDGET / pair))))
        return median_ratio(seconds["expanded"], seconds["sparse"])


def measure_table(
    shapes: list[tuple[int, int]], rounds: int = 15, found: Callable[[str, str, int, float], None] | None = None
) -> Crossovers:
    """
    The table for this CPU, with as many threads as torch has now. It takes about four minutes on two cores.

    Args:
        shapes (`list[tuple[int, int]]`): (out, in) of the layers to measure with.
        rounds (`int`, *optional*, defaults to 15): pairs of timings at most.
        found (`Callable`, *optional*): is told dtype, product, tokens and density of each of the `ENTRIES`.
    """
    table: Crossovers = {}
    for dtype in DTYPES:
        layers = [Layer(shape, getattr(torch, dtype)) for shape in shapes]
        table[dtype] = {}
        for product in PRODUCTS:
            row: list[float] = []
            seconds = 0.0
            for tokens in TOKENS:
                if seconds <= PATIENCE:
                    start = time.perf_counter()
                    limit = min(crossover(functools.partial(each.ratio, product, tokens, rounds)) for each in layers)
                    seconds = time.perf_counter() - start
                row.append(round(limit, 2))
                if found is not None:
                    found(dtype, product, tokens, row[-1])
            table[dtype][product] = tuple(row)
    return table
