"""
How the products of blocks are cut into tiles: what Triton's autotuner tries at the first call of each kind, and keeps.

Compiled for compute capability 9.0, for square blocks of 16, 64 and 128: no choice spills registers in bf16, fp16 and
tf32, and none that is left spills more than 96 bytes of a thread in fp32. Their times have not been measured yet.
"""

from collections.abc import Callable

import torch
import triton

from .launch import INTERPRETED


MAX_TILE = 128
# Sums that a thread keeps in its registers beside operands and addresses.
MAX_SUMS = 64

# Tokens and gathered features of a tile, warps, stages.
PRODUCT_TILES = [(64, 64, 4, 3), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (256, 64, 8, 3), (16, 64, 4, 4)]
GRADIENT_TILES = [(32, 64, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3), (64, 256, 8, 3)]
# What the best configuration depends on, beside dtypes.
PRODUCT_KEY = ["scale", "lines", "x_features", "EXPERTS", "TRANSPOSED", "SIDE_N", "SIDE_K", "PRECISION"]
GRADIENT_KEY = ["scale", "out_features", "in_features", "EXPERTS", "HEIGHT", "WIDTH", "PRECISION"]


def configurations(tiles: list[tuple[int, int, int, int]]) -> list[triton.Config]:
    """What Triton's autotuner tries; in the interpreter, where there is nothing to gain, the first one alone."""
    return [
        triton.Config({"TILE_TOKENS": tokens, "TILE_K": features, "STAGES": stages}, num_warps=warps)
        for tokens, features, warps, stages in (tiles[:1] if INTERPRETED else tiles)
    ]


def without_spills(side: str) -> dict[str, Callable]:
    """
    For the autotuner: leaves out tiles of `side` × `TILE_N` sums that a thread cannot keep in its registers where
    numbers are multiplied one by one, which is fp32 without tf32. Tensor cores have room for all.
    """

    def prune(configs, arguments, *, TILE_N, PRECISION, **_):
        if arguments["x"].dtype != torch.float32 or PRECISION != "ieee":
            return configs
        return [one for one in configs if one.kwargs[side] * TILE_N <= MAX_SUMS * 32 * one.num_warps]

    return {"early_config_prune": prune}


def tile_of(side: int) -> int:
    """The largest power of two that divides a block's side, as Triton's tiles are."""
    return min(side & -side, MAX_TILE)


def scale_of(tokens: int) -> int:
    """Few, some or many tokens: what is fast for the one is not for the other, and each is tuned apart."""
    return (tokens > 64) + (tokens > 1024)
