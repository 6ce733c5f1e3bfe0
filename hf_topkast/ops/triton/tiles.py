"""
How the products of blocks are cut into tiles: what Triton's autotuner tries at the first call of each kind, and keeps.

Compiled for compute capability 9.0, for square blocks of 16, 64 and 128: no choice spills registers in bf16, fp16 and
tf32, and none that is left spills more than 96 bytes of a thread in fp32. Those of large blocks are the fastest of
some twenty on an H100.
"""

from collections.abc import Callable

import torch
import triton
from triton.runtime import driver

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

# Of large blocks: tokens and features of a tile, warps, stages.
LARGE_PRODUCT_TILES = [(128, 64, 4, 3), (256, 64, 8, 3), (256, 64, 8, 4), (128, 32, 4, 5), (64, 64, 4, 4)]
# Tiles that a program has, tokens of each step, warps, stages.
LARGE_GRADIENT_TILES = [(1, 64, 4, 4), (1, 32, 4, 5), (1, 64, 8, 4), (2, 64, 8, 3), (2, 64, 8, 4)]
LARGE_PRODUCT_KEY = ["scale", "lines", "EXPERTS", "TRANSPOSED", "SIDE_N", "SIDE_K"]
LARGE_GRADIENT_KEY = ["scale", "out_features", "in_features", "HEIGHT", "WIDTH"]


def configurations(tiles: list[tuple[int, int, int, int]]) -> list[triton.Config]:
    """What Triton's autotuner tries; in the interpreter, where there is nothing to gain, the first one alone."""
    return [
        triton.Config({"TILE_TOKENS": tokens, "TILE_K": features, "STAGES": stages}, num_warps=warps)
        for tokens, features, warps, stages in (tiles[:1] if INTERPRETED else tiles)
    ]


def large_product_configurations() -> list[triton.Config]:
    """As [`configurations`], for products of large blocks, whose operands are tensor descriptors."""

    def set_tiles(arguments):
        tile_n, tile_k = arguments["TILE_N"], arguments["TILE_K"]
        arguments["x"].block_shape = [arguments["TILE_TOKENS"], tile_k]
        arguments["values"].block_shape = [tile_k, tile_n] if arguments["TRANSPOSED"] else [tile_n, tile_k]

    return [
        triton.Config(
            {"TILE_TOKENS": tokens, "TILE_K": features, "STAGES": stages}, num_warps=warps, pre_hook=set_tiles
        )
        for tokens, features, warps, stages in (LARGE_PRODUCT_TILES[:1] if INTERPRETED else LARGE_PRODUCT_TILES)
    ]


def large_gradient_configurations(side: int) -> list[triton.Config]:
    """As [`configurations`], for gradients of large blocks, in tiles of a side."""

    def set_tiles(arguments):
        for operand in (arguments["dy"], arguments["x"]):
            operand.block_shape = [arguments["TILE_TOKENS"], side]

    return [
        triton.Config(
            {"TOGETHER": together, "TILE_TOKENS": tokens, "STAGES": stages}, num_warps=warps, pre_hook=set_tiles
        )
        for together, tokens, warps, stages in (LARGE_GRADIENT_TILES[-1:] if INTERPRETED else LARGE_GRADIENT_TILES)
    ]


def time_briefly(call: Callable, quantiles: tuple[float, ...]) -> list[float]:
    """Milliseconds of a call, for the autotuner: Triton's own way, in a fifth of its time."""
    return driver.active.get_benchmarker()(call, quantiles=quantiles, warmup=5, rep=20)


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
