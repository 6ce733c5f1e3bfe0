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
from .inputs import ExpertSquares, InputSquares
from .pattern import GRAIN, Pattern, pack_bits, set_sizes, spread_blocks, unpack_bits
from .rearrangement import count_from
from .reservoir import NOWHERE, Arriving, assemble_theta
from .resharding import find_handles
from .set_watch import mixture
from .state_dict import STRUCTURE, dense_state
from .store import LIVING, TRACKING, Moment, SparseStorage, scored


__all__ = [
    "GRAIN",
    "LIVING",
    "NOWHERE",
    "STRUCTURE",
    "TRACKING",
    "Arriving",
    "ExpertSquares",
    "InputSquares",
    "Moment",
    "Pattern",
    "SparseStorage",
    "assemble_theta",
    "check_agreement",
    "count_from",
    "dense_state",
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
