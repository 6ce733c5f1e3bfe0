"""
Which of two ways is faster on a CPU: the sparse kernels, or dense products through an expanded α.

The model is a table of crossover densities, by dtype, product and number of tokens: that of this kind of CPU
(`crossovers.py`), or one that was measured on this machine (`measured.py`). It is chosen once, at import, and nothing
is timed at run time, so that results never vary.
"""

import math
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from ..storage import Pattern
from . import measured
from .crossovers import CROSSOVERS, TOKENS, Crossovers


try:
    from .cpu import isa
except ImportError:  # without kernels nobody asks which way is faster
    isa = "portable"

logger = logging.get_logger(__name__)

# How much higher the crossovers lie where blocks let outputs share the loads of their inputs (25–50% less time).
BLOCK_GAIN = 1.3
# The table's sparse kernels for few tokens, which walk the pattern as it is, are for single weights only (and for a
# forward pass of up to 3 tokens): with blocks, an expanded α is faster below so many tokens, where blocks let outputs
# share loads and where they do not.
BLOCK_TOKENS = {True: 32, False: 128}
# Except here, where it is so below 4 tokens only: without AVX-512 torch multiplies bf16 up to a hundred times as
# slowly as fp32.
SLOW_DENSE = ("avx2", "bfloat16")


def kind_of(isa: str, amx: bool) -> str:
    """
    The kind of CPU, a key of `CROSSOVERS`.

    Args:
        isa (`str`): the instruction set of the kernels: `"avx512"`, `"avx2"` or `"portable"`.
        amx (`bool`): whether the CPU has matrix units.
    """
    if isa != "avx512":
        return "avx2"
    return "amx" if amx else "avx512"


class Table(NamedTuple):
    """Crossovers, where they come from, and what the log is to say about it, if anything."""

    crossovers: Crossovers
    origin: str
    notice: str | None = None


def choose(kind: str, isa: str, path: Path) -> Table:
    """The table measured on this machine, if `path` is one that counts here, else the one for this kind of CPU."""
    built_in = f"the built-in table for {kind}"
    try:
        own = measured.read(path, kind, isa)
    except ValueError as error:
        return Table(CROSSOVERS[kind], built_in, f"hf_topkast uses {built_in}: {error}")
    if own is None:
        return Table(CROSSOVERS[kind], built_in)
    crossovers, how = own
    origin = f"{path}, measured on this machine {how}"
    return Table(crossovers, origin, f"hf_topkast chooses between sparse and dense products by {origin}.")


KIND = kind_of(isa, amx=getattr(torch.cpu, "_is_amx_tile_supported", bool)())
TABLE = choose(KIND, isa, measured.PATH)


def table_in_use() -> str:
    """Which table of crossovers this process uses, in words: the built-in one for a kind of CPU, or a file."""
    return TABLE.origin


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
    densities, dense = rule(product, x.dtype, pattern.block_size)
    if tokens in dense:
        return False
    limit = crossover(densities, tokens)
    if limit >= 1:  # without counting
        return True
    count = pattern.stored if product == "grad_values" else pattern.active
    return count <= limit * pattern.numel


def rule(product: str, dtype: torch.dtype, block_size: tuple[int, int]) -> tuple[tuple[float, ...], range]:
    """
    The crossovers of a product at each of TOKENS, and with how many tokens dense products are faster at any density.

    Args:
        product (`str`): `"forward"`, `"grad_input"` or `"grad_values"`.
        dtype (`torch.dtype`): of the dense operand, float32 or bfloat16.
        block_size (`tuple[int, int]`): of the pattern.
    """
    if TABLE.notice:
        logger.warning_once(TABLE.notice)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    densities = TABLE.crossovers[name][product]
    if block_size == (1, 1):
        return densities, range(0)
    shared = block_size[1 if product == "grad_input" else 0] % 4 == 0
    few = 4 if (KIND, name) == SLOW_DENSE else BLOCK_TOKENS[shared]
    gain = BLOCK_GAIN if shared else 1
    return tuple(gain * density for density in densities), range(4 if product == "forward" else 0, few)
