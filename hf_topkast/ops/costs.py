"""
Which of two ways is faster on a CPU: the sparse kernels, or dense products through an expanded α.

The model is a table of crossover densities, by product, arithmetic and number of tokens, measured with
`python -m benchmarks.crossover` on a 2-core AVX-512 Xeon with AMX (2 threads, torch 2.13.0, 2026-11-22; the smaller of
the crossovers at 768 × 768 and 2048 × 2048, evened out where neighbours differed by the noise of the measurement). It
is fixed: nothing is timed at run time, so that results never vary.
"""

import math
from bisect import bisect_right

import torch
from torch import Tensor

from ..storage import Pattern


# Whether this CPU multiplies tiles of bf16, which makes dense bf16 products 5–10 times as fast as those of fp32.
AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()

# At so many tokens …
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 4096)
# … the sparse kernels are the faster way up to these densities, of A or, for grad_values, of B.
CROSSOVERS: dict[tuple[str, bool], tuple[float, ...]] = {
    ("forward", False): (1, 0.8, 1, 0.65, 0.36, 0.3, 0.5, 0.54, 0.6),
    ("grad_input", False): (0.05, 0.2, 0.44, 0.19, 0.19, 0.17, 0.33, 0.5, 0.55),
    ("grad_values", False): (1, 0.9, 1, 0.54, 0.22, 0.25, 0.34, 0.36, 0.58),
    ("forward", True): (1, 0.46, 0.5, 0.14, 0.07, 0.02, 0.02, 0.04, 0.03),
    ("grad_input", True): (0.24, 0.26, 0.28, 0.06, 0.03, 0.02, 0.03, 0.04, 0.03),
    ("grad_values", True): (0.7, 0.85, 0.85, 0.28, 0.04, 0.04, 0.05, 0.08, 0.08),
}
# How much higher the crossovers lie where blocks let outputs share the loads of their inputs (25–50% less time).
BLOCK_GAIN = 1.3
# The table's sparse kernels for few tokens, which walk the pattern as it is, are for single weights only (and for a
# forward pass of up to 3 tokens): with blocks, an expanded α is faster below so many tokens, where blocks let outputs
# share loads and where they do not.
BLOCK_TOKENS = {True: 32, False: 128}


def crossover(densities: tuple[float, ...], tokens: int) -> float:
    """The crossover at any number of tokens: between two of the table by the logarithm of the tokens."""
    above = bisect_right(TOKENS, tokens)
    if above == 0 or above == len(TOKENS):
        return densities[max(0, above - 1)]
    share = math.log(tokens / TOKENS[above - 1]) / math.log(TOKENS[above] / TOKENS[above - 1])
    return densities[above - 1] + share * (densities[above] - densities[above - 1])


def sparse_is_faster(product: str, x: Tensor, pattern: Pattern) -> bool:
    """
    Whether the sparse kernels are faster than dense products with an expanded α.

    Args:
        product (`str`): `"forward"`, `"grad_input"` or `"grad_values"`.
        x (`torch.Tensor`): the dense operand, (..., features), float32 or bfloat16.
        pattern ([`Pattern`]): of the sparse one.
    """
    tokens = x.numel() // max(1, x.shape[-1])
    side = pattern.block_size[1 if product == "grad_input" else 0]
    shared = side % 4 == 0
    if pattern.block_size != (1, 1) and tokens < BLOCK_TOKENS[shared] and (product != "forward" or tokens > 3):
        return False
    limit = crossover(CROSSOVERS[product, AMX and x.dtype == torch.bfloat16], tokens)
    if limit >= 1:
        return True
    if shared:
        limit *= BLOCK_GAIN
    count = pattern.stored if product == "grad_values" else pattern.active
    return count <= limit * pattern.numel
