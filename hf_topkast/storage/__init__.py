"""
What a sparse layer keeps, and where: the values of B, their structure, the reservoir outside B, and the parts of them
that each process holds.
"""

from .change import Change
from .distributed import (
    check_agreement,
    full,
    is_sharded,
    local,
    part_of,
    prefix_here,
    raise_together,
    set_digest,
    shard_like,
    sum_over_ranks,
    world_size,
)
from .inputs import ExpertSquares, InputSquares
from .moment import Matrix, Moment, scored
from .pattern import (
    GRAIN,
    Pattern,
    blocks_of,
    pack_bits,
    pack_part,
    set_sizes,
    spread_blocks,
    unpack_bits,
    unpack_part,
)
from .reservoir import NOWHERE, Arriving, assemble_theta
from .resharding import find_handles
from .scattering import from_grid, reordered, to_grid
from .set_watch import mixture
from .state_dict import STRUCTURE, dense_state
from .store import LIVING, TRACKING, SparseStorage


__all__ = [
    "GRAIN",
    "LIVING",
    "NOWHERE",
    "STRUCTURE",
    "TRACKING",
    "Arriving",
    "Change",
    "ExpertSquares",
    "InputSquares",
    "Matrix",
    "Moment",
    "Pattern",
    "SparseStorage",
    "assemble_theta",
    "blocks_of",
    "check_agreement",
    "dense_state",
    "find_handles",
    "from_grid",
    "full",
    "is_sharded",
    "local",
    "mixture",
    "pack_bits",
    "pack_part",
    "part_of",
    "prefix_here",
    "raise_together",
    "reordered",
    "scored",
    "set_digest",
    "set_sizes",
    "shard_like",
    "spread_blocks",
    "sum_over_ranks",
    "to_grid",
    "unpack_bits",
    "unpack_part",
    "world_size",
]
