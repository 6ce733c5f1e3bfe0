"""
The deepest GPT-2 of one width that a GPU trains, dense against sparse, and how many weights that is.

    python -m benchmarks.largest --device cuda --bf16 --width 2048 --batch 4 [--json FILE]

Every layer takes the same memory: it is measured at two depths, carried on to the GPU's memory, and what is shown was
then trained there, two steps and a refresh, with the reservoir in host memory; where that does not fit, a depth less
by 2% is tried. The layers are copies of one, sparse before it is copied, so that nothing dense bounds the search.

On a CPU it is the live bytes that count, without activations, against a limit of `--mib`.
"""

import argparse
import copy
import functools
import gc
import math
from collections.abc import Callable

import torch
from transformers import GPT2LMHeadModel

from hf_topkast import sparsify

from .measure import add_model, make_gpt2, make_parser, report
from .memory import SETTINGS, after_two_steps


DEPTHS = 2, 4


def build(layers: int, settings: dict, args: argparse.Namespace) -> GPT2LMHeadModel:
    """A model of equal layers on the device; dense where the settings are empty."""
    model = make_gpt2(1, args.width, args.context, args.vocabulary)
    if settings:
        sparsify(model, **settings)
    model.to(args.device)
    (block,) = model.transformer.h
    model.transformer.h.extend(copy.deepcopy(block) for _ in range(layers - 1))
    model.config.n_layer = layers
    model.config.use_cache = False  # which would take the copies, all of one number, for one layer
    return model


def used_mib(layers: int, settings: dict, args: argparse.Namespace) -> float:
    """MiB that training takes at most, or on a CPU holds; infinite where it does not fit."""
    try:
        found = after_two_steps(build(layers, settings, args), args)
    except torch.cuda.OutOfMemoryError:
        return math.inf
    finally:
        gc.collect()  # a controller and its optimizer hold each other
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return found.get("peak", found["live"])


def largest_depth(used: Callable[[int], float], limit: float) -> tuple[int, float]:
    """
    The number of layers that fit, and what they use.

    Args:
        used (`Callable[[int], float]`): what a model of so many layers takes.
        limit (`float`): what there is.

    Raises:
        ValueError: if the shallowest model does not fit.
    """
    low, high = (used(depth) for depth in DEPTHS)
    if not high <= limit:
        raise ValueError(f"A model of {DEPTHS[1]} layers takes {high:.0f} MiB of {limit:.0f}: choose a smaller width.")
    depth = DEPTHS[1] + int((limit - high) * (DEPTHS[1] - DEPTHS[0]) // (high - low))
    while (found := used(depth)) > limit:
        depth -= max(1, depth // 50)
    return depth, found


def main():
    """Prints the table."""
    parser = make_parser(__doc__)
    add_model(parser, layers=0, width=2048, vocabulary=50257, context=1024, batch=4)
    parser.add_argument("--mib", type=float, help="default: what the GPU has free")
    args = parser.parse_args()
    if args.mib is None:
        if args.device == "cpu":
            parser.error("on a CPU give a limit, for example --mib 1000")
        args.mib = torch.cuda.mem_get_info()[0] / 2**20  # what is free: others and CUDA itself have some
    if args.layers:
        parser.error("--layers is what is looked for: leave it out, and give the other sizes one by one, not --model")
    torch.set_num_threads(args.threads)

    place = "cpu" if args.device == "cuda" else "disk"
    rows = []
    for densities in (None, *SETTINGS):
        settings = {}
        if densities:
            settings = dict(zip(("density", "backward_density"), densities), reservoir_device=place, refresh_every=2)
        depth, found = largest_depth(functools.partial(used_mib, settings=settings, args=args), args.mib)
        weights = depth * 12 * args.width**2
        rows.append(
            {
                "density / backward": "{} / {}".format(*densities) if densities else "dense",
                "layers": depth,
                "weights of projections, billions": weights / 1e9,
                "MiB": found,
                "limit MiB": args.mib,
                "times dense": depth / (rows[0]["layers"] if rows else depth),
            }
        )
    report(rows, args, ["times dense"])


if __name__ == "__main__":
    main()
