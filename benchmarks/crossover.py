"""
Up to which density the sparse kernels are faster than dense products through an expanded α, on this CPU.

    OMP_PROC_BIND=true OMP_PLACES={0},{1} python -m benchmarks.crossover --threads 2 --json crossover.json

Prints the table of `hf_topkast/ops/costs.py`: for each product, arithmetic and number of tokens the density at which
the two ways take equal time, the smallest one over the shapes, between the neighbours of a grid by interpolation.
"""

import itertools
import json

import torch

from hf_topkast.ops import cpu, expanded
from hf_topkast.ops.costs import TOKENS

from .kernels import PASSES, Problem
from .measure import interleaved, machine, make_parser, median_ratio


DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.9)


def crossover(ratios: list[float]) -> float:
    """Where `ratios`, expanded time over sparse time at DENSITIES, falls below 1: a density, 1 for never."""
    points = list(zip(DENSITIES, ratios))
    if points[0][1] < 1:
        return 0.0
    for (low, above), (high, below) in itertools.pairwise(points):
        if below < 1:
            return low + (high - low) * (above - 1) / (above - below)
    return 1.0


def main():
    """Prints the table."""
    parser = make_parser(__doc__, devices=("cpu",))
    parser.add_argument("--shapes", nargs="+", default=["768x768", "2048x2048"], help="out x in")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {"machine": machine(), "tokens": TOKENS, "crossovers": []}
    print(" · ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for dtype in arguments.dtypes:
        rows = {name: [] for name in PASSES}
        for tokens in TOKENS:
            limits = dict.fromkeys(PASSES, 1.0)
            for shape in arguments.shapes:
                ratios = {name: [] for name in PASSES}
                for density in DENSITIES:
                    size = tuple(map(int, shape.split("x")))
                    problem = Problem(size, tokens, density, 1.0, getattr(torch, dtype))
                    sparse, dense = problem.backend(cpu), problem.backend(expanded)
                    for name in PASSES:
                        seconds = interleaved({"sparse": sparse[name], "expanded": dense[name]}, arguments.rounds)
                        ratios[name].append(median_ratio(seconds["expanded"], seconds["sparse"]))
                for name in PASSES:
                    limits[name] = min(limits[name], crossover(ratios[name]))
            for name in PASSES:
                rows[name].append(round(limits[name], 2))
        for name in PASSES:
            print(f"{name}, {dtype}: {tuple(rows[name])}", flush=True)
            result["crossovers"].append({"product": name, "dtype": dtype, "densities": rows[name]})
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
