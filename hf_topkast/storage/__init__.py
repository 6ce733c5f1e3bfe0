"""
What a sparse layer keeps, and where: the values of B, their structure, the reservoir outside B, and the parts of them
that each process holds.
"""

from .distributed import (
    check_agreement,
    full,
    is_sharded,
    local,
    moved,
    part_of,
    prefix_here,
    raise_together,
    set_digest,
    shard_like,
    sum_over_ranks,
    world_size,
)
from .inputs import InputSquares
from .pattern import GRAIN, Pattern, pack_bits, set_sizes, spread_blocks, unpack_bits
from .reservoir import NOWHERE, Arriving, assemble_theta
from .resharding import find_handles
from .set_watch import mixture
from .store import LIVING, STRUCTURE, TRACKING, Moment, SparseStorage, scored


__all__ = [
    "GRAIN",
    "LIVING",
    "NOWHERE",
    "STRUCTURE",
    "TRACKING",
    "Arriving",
    "InputSquares",
    "Moment",
    "Pattern",
    "SparseStorage",
    "assemble_theta",
    "check_agreement",
    "find_handles",
    "full",
    "is_sharded",
    "local",
    "mixture",
    "moved",
    "pack_bits",
    "part_of",
    "prefix_here",
    "raise_together",
    "scored",
    "set_digest",
    "set_sizes",
    "shard_like",
    "spread_blocks",
    "sum_over_ranks",
    "unpack_bits",
    "world_size",
]
