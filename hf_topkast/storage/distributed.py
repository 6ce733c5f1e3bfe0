"""
Several processes: tensors that are sharded over them (FSDP2), and the proof that all of them hold the same sets. In
one process every function here does nothing.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from ..native import accelerated_by
from . import passes
from .pattern import Pattern


# Whether torch's FSDP2 shards parameters of integers: up to 2.11 it stops at them.
SHARDS_INTEGERS: bool = torch.__version__ >= "2.12"

# Slots that a digest takes by torch's operations at a time: all of a stack of experts would be larger than their θ.
SLOTS_AT_ONCE = 2**22


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of the tensor only."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, sharing memory; all of a tensor that is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered if it is sharded: then every rank has to call."""
    if not is_sharded(tensor):
        return tensor
    tensor = tensor.to(tensor.device_mesh.device_type)  # FSDP may have offloaded it to the host
    if tensor.dtype == torch.int16:  # unknown to gloo
        return tensor.to(torch.int32).full_tensor().to(torch.int16)
    return tensor.full_tensor()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have whole, cut as `like` is. Without communication."""
    return shard_like(whole, like).to_local() if is_sharded(like) else whole


def shard_like(whole: Tensor, like: DTensor) -> DTensor:
    """A tensor that all ranks have whole, sharded as `like` is. Without communication."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@accelerated_by(passes.carry)
def carry(numbers: Tensor, sources: Tensor, fresh: Tensor) -> Tensor:
    """
    One number a slot, moved with its weight to other slots.

    Args:
        numbers (`torch.Tensor`): (|B| before,).
        sources (`torch.Tensor`): integers, (|B| now,): the former slot of each slot, -1 for a weight that enters B.
        fresh (`torch.Tensor`): what weights that enter start with: a scalar, or (|B| now,).

    Returns:
        `torch.Tensor`: (|B| now,), in a tensor of its own.
    """
    return torch.where(sources >= 0, numbers[sources.clamp(min=0)], fresh)


def prefix_here(count: int, like: Tensor) -> int:
    """How many of the first `count` elements of a vector lie in this rank's part of it."""
    return min(max(0, count - place_here(like)), len(local(like)))


def place_here(like: Tensor) -> int:
    """Where in a vector the part of it begins that this rank holds."""
    if not is_sharded(like):
        return 0
    (chunk,) = like.__create_chunk_list__()  # how DTensor tells checkpoints its place
    return chunk.offsets[0]


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in the group (all of them, for `None`); 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(part: Tensor, like: Tensor) -> Tensor:
    """The sum of a scalar over the ranks that hold the parts of `like`; the scalar itself where it is whole."""
    if is_sharded(like):
        pending = [Partial() if placement.is_shard() else placement for placement in like.placements]
        part = DTensor.from_local(part, like.device_mesh, pending).full_tensor()
    return part


@accelerated_by(passes.set_digest)
def set_digest(pattern: Pattern) -> Tensor:
    """
    A number that two equal pairs of sets share, and two different ones all but never: of the members, and of
    `row_offsets`, which every rank has its own copy of where members of B are gathered from all. int64 scalar.
    """
    row_offsets = pattern.row_offsets
    places = torch.arange(1, len(row_offsets) + 1, device=row_offsets.device)
    digest = (places * -4265267296055464877 * row_offsets).sum()
    for first, members, active in _pieces(pattern):
        mixed = 2 * (members.flat_index() + first) + (2 if active else 1)
        mixed *= -7046029254386353131  # integers wrap around: that is the hashing
        mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
        digest = digest + (mixed ^ (mixed >> 32)).sum()
    return digest


def _pieces(pattern: Pattern) -> Iterator[tuple[int, Pattern, bool]]:
    """A, then B\\A, some rows at a time: the flat index that these begin at, their members, and whether it is A."""
    lines = len(pattern.row_offsets) // 2
    step = max(1, SLOTS_AT_ONCE * lines // max(1, pattern.stored))
    for active in (True, False):
        offsets = pattern.row_offsets[: lines + 1] if active else pattern.row_offsets[lines:]
        begins = [*offsets[:-1:step].tolist(), int(offsets[-1])]
        one = pattern._replace(row_offsets=offsets)
        for place, (begin, end) in enumerate(pairwise(begins)):
            rows = range(place * step, min((place + 1) * step, lines))
            height = pattern.block_size[0] * pattern.shape[1]
            yield rows.start * height, one.active_part(rows, begin, end), active


def check_agreement(digests: dict[str, Tensor], group: dist.ProcessGroup | None = None):
    """
    Proves that all ranks have the same digest of every layer's sets; every rank has to call.

    Args:
        digests (`dict[str, torch.Tensor]`): int64 scalar per layer, by name, on the device of the group's backend.
        group (`ProcessGroup`, *optional*): the ranks that train the model. `None`: all.

    Raises:
        RuntimeError: on every rank, if some rank differs; the message names the first such layer and the ranks.
    """
    if world_size(group) == 1:
        return
    mine = torch.stack(list(digests.values()))
    everyone = mine.new_empty(world_size(group), mine.numel())
    dist.all_gather(list(everyone.unbind()), mine, group=group)
    differs = everyone != everyone[0]
    if not bool(differs.any()):
        return
    layer = int(differs.any(dim=0).nonzero()[0])
    ranks = differs[:, layer].nonzero().flatten().tolist()
    raise RuntimeError(
        f"Layer '{list(digests)[layer]}': the sets A and B of rank {', '.join(map(str, ranks))} are not those of rank "
        f"0 ({int(differs.any(dim=0).sum())} such layers), so training would go wrong silently. Sparsify the same "
        "weights on every rank (the same seed, or one checkpoint; the same calibration), change weights on all ranks "
        "alike, and resume from the last checkpoint."
    )


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None):
    """
    Raises an error of any rank on every rank, so that none waits for one that is gone; every rank has to call.

    Args:
        error (`Exception`, *optional*): what went wrong on this rank.
        group (`ProcessGroup`, *optional*): the ranks that train the model. `None`: all.

    Raises:
        Exception: `error` itself.
        RuntimeError: on the ranks where all is well, if it is not on others; the message names them.
    """
    if world_size(group) > 1:
        messages: list[str | None] = [None] * world_size(group)
        dist.all_gather_object(messages, None if error is None else str(error), group=group)
        if error is None and any(messages):
            rank, message = next((rank, text) for rank, text in enumerate(messages) if text)
            raise RuntimeError(f"Rank {rank}: {message}")
    if error is not None:
        raise error
