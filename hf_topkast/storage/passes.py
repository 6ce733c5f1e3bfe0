"""
What a refresh does to one layer, each in one pass of the C++ extension over it: the same functions of the same tensors
as in `pattern.py`, `reservoir.py` and `distributed.py`, bit for bit, or `NotImplemented` for types it does not know.

Devices are named, for a model may be made under `torch.device("meta")`.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..native import array, extension, thread_count


if TYPE_CHECKING:
    from .pattern import Pattern

# Bytes of numbers that are moved and not computed with.
ITEM_SIZES = (2, 4, 8)
SOURCE_TYPES = (torch.int32, torch.int64)


def source_dtype(pattern: "Pattern") -> torch.dtype:
    """What holds every slot of a pattern."""
    return torch.int32 if pattern.stored <= torch.iinfo(torch.int32).max else torch.int64


def structure(pattern: "Pattern") -> "extension.Pattern":
    """The arrays and sizes of a pattern that [`is_laid_out`]."""
    arrays = array(pattern.row_offsets), array(pattern.columns)
    return extension.Pattern(*arrays, *pattern.shape, *pattern.block_size)


def is_laid_out(pattern: "Pattern") -> bool:
    """Whether the arrays are what [`Pattern.from_masks`] makes; the extension would read past their ends."""
    offsets, columns = pattern.row_offsets, pattern.columns
    whole = offsets.is_contiguous() and columns.is_contiguous() and offsets.device.type == columns.device.type == "cpu"
    types = columns.dtype in (torch.int16, torch.int32) and offsets.dtype in (torch.int32, torch.int64)
    return whole and types and offsets.numel() == 2 * (pattern.shape[0] // pattern.block_size[0]) + 1


def row_structure(active: Tensor, backward: Tensor, block_size: tuple[int, int], dtype: torch.dtype):
    """`row_offsets`, int64, and `columns` of the structure of two masks, as [`Pattern.from_masks`] makes them."""
    sides = [size % side for size, side in zip(active.shape, block_size)]
    if not _are_masks(active, backward) or active.ndim != 2 or any(sides) or dtype not in (torch.int16, torch.int32):
        return NotImplemented
    active, backward = active.contiguous(), backward.contiguous()
    masks, threads = (active.data_ptr(), backward.data_ptr()), thread_count(active.numel())
    row_offsets = torch.empty(2 * (active.shape[0] // block_size[0]) + 1, dtype=torch.int64, device="cpu")

    def pattern(columns: Tensor) -> "extension.Pattern":
        return extension.Pattern(array(row_offsets), array(columns), *active.shape, *block_size)

    if not extension.count_rows(*masks, pattern(torch.empty(0, dtype=dtype, device="cpu")), threads):
        return NotImplemented  # which says what is wrong
    columns = torch.empty(int(row_offsets[-1]), dtype=dtype, device="cpu")
    extension.fill_columns(*masks, pattern(columns), threads)
    return row_offsets, columns


def mask_of(pattern: "Pattern", whole: bool) -> Tensor:
    """A, or with `whole` B, as a bool mask, (out, in): `Pattern`'s masks."""
    if not _is_known(pattern):
        return NotImplemented
    mask = torch.empty(pattern.shape, dtype=torch.bool, device="cpu")
    extension.mark_members(structure(pattern), whole, mask.data_ptr(), thread_count(pattern.numel))
    return mask


def take_slots(theta: Tensor, pattern: "Pattern") -> Tensor:
    """The numbers of θ, (out, in), at the slots of a pattern: (|B|,)."""
    if theta.element_size() not in ITEM_SIZES or theta.shape != pattern.shape or not _is_known(pattern):
        return NotImplemented
    theta, values = theta.contiguous(), theta.new_empty(pattern.stored)
    place = structure(pattern), 0, pattern.shape[0], array(theta), array(values)
    extension.gather(*place, thread_count(pattern.stored))
    return values


def rearrange(
    theta: Tensor,
    backward: Tensor,
    former: "Pattern",
    pattern: "Pattern",
    keeps_rest: bool,
    into: tuple[Tensor, ...] = (),
):
    """As `rearrangement.rearrange`."""
    shapes = theta.shape == backward.shape == former.shape == pattern.shape and former.block_size == pattern.block_size
    types = theta.element_size() in ITEM_SIZES and _are_masks(backward)
    if not (shapes and types and _is_known(former) and _is_known(pattern)):
        return NotImplemented
    theta, backward = theta.contiguous(), backward.contiguous()
    sizes = pattern.stored, theta.numel() - pattern.stored if keeps_rest else 0
    values, reservoir = (_memory(theta, size, *into[place : place + 1]) for place, size in enumerate(sizes))
    sources = torch.empty(pattern.stored, dtype=source_dtype(former), device="cpu")
    places = array(theta), backward.data_ptr(), array(sources), array(values), array(reservoir)
    extension.rearrange(structure(former), structure(pattern), *places, thread_count(theta.numel()))
    return sources, values, reservoir


def count_from(sources: Tensor, former: int) -> int:
    """As `rearrangement.count_from`."""
    if sources.dtype not in SOURCE_TYPES or not sources.is_contiguous():
        return NotImplemented
    return extension.count_from(array(sources), sources.numel(), former)


def outside(numbers: Tensor, mask: Tensor) -> Tensor:
    """As `reservoir.outside`."""
    if numbers.element_size() not in ITEM_SIZES or not _are_masks(mask) or numbers.shape != mask.shape:
        return NotImplemented
    numbers, mask = numbers.contiguous(), mask.contiguous()
    threads, numel = thread_count(numbers.numel()), numbers.numel()
    marked, _, _ = extension.set_sizes(mask.data_ptr(), mask.data_ptr(), numel, threads)
    rest = numbers.new_empty(numel - marked)
    extension.leave_out(array(numbers), mask.data_ptr(), numel, marked, array(rest), threads)
    return rest


def assemble_theta(values: Tensor, pattern: "Pattern", reservoir: Tensor) -> Tensor:
    """As `reservoir.assemble_theta`."""
    fits = len(values) == pattern.stored and len(reservoir) in (0, pattern.numel - pattern.stored)
    types = values.dtype == reservoir.dtype and values.element_size() in ITEM_SIZES
    if not (fits and types and _is_known(pattern)):
        return NotImplemented
    theta = values.new_empty(pattern.shape)
    numbers = (array(part) for part in (values.contiguous(), reservoir.contiguous(), theta))
    extension.assemble(structure(pattern), *numbers, thread_count(pattern.numel))
    return theta


def carry(numbers: Tensor, sources: Tensor, fresh: Tensor) -> Tensor:
    """As `distributed.carry`."""
    fits = numbers.ndim == sources.ndim == 1 and fresh.shape in ((), sources.shape)
    types = numbers.dtype == fresh.dtype and numbers.element_size() in ITEM_SIZES and sources.dtype in SOURCE_TYPES
    if not (fits and types):
        return NotImplemented
    numbers, sources, fresh = numbers.contiguous(), sources.contiguous(), fresh.contiguous()
    carried = numbers.new_empty(sources.shape)
    places = len(numbers), array(sources), len(sources), array(fresh), fresh.ndim, array(carried)
    inside = extension.carry(array(numbers), *places, thread_count(len(sources)))
    return carried if inside else NotImplemented


def set_sizes(active: Tensor, backward: Tensor) -> tuple[int, int, int]:
    """How many places A has, B has, and A has outside of B."""
    if not _are_masks(active, backward):
        return NotImplemented
    active, backward, numel = active.contiguous(), backward.contiguous(), active.numel()
    return tuple(extension.set_sizes(active.data_ptr(), backward.data_ptr(), numel, thread_count(numel)))


def pack_bits(mask: Tensor) -> Tensor:
    """As `pattern.pack_bits`."""
    if not _are_masks(mask):
        return NotImplemented
    mask, packed = mask.contiguous(), torch.empty(-(-mask.numel() // 8), dtype=torch.uint8, device="cpu")
    extension.pack_bits(mask.data_ptr(), mask.numel(), packed.data_ptr(), thread_count(mask.numel()))
    return packed


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """As `pattern.unpack_bits`."""
    if packed.dtype != torch.uint8 or packed.ndim != 1 or numel > 8 * len(packed):
        return NotImplemented
    packed, mask = packed.contiguous(), torch.empty(numel, dtype=torch.bool, device="cpu")
    extension.unpack_bits(packed.data_ptr(), numel, mask.data_ptr(), thread_count(numel))
    return mask


def set_digest(pattern: "Pattern") -> Tensor:
    """As `distributed.set_digest`."""
    if not (is_laid_out(pattern) and _is_sound(pattern)):
        return NotImplemented
    return torch.tensor(extension.set_digest(structure(pattern), thread_count(pattern.stored)), device="cpu")


def _memory(like: Tensor, size: int, offered: Tensor | None = None) -> Tensor:
    """For so many numbers: what is offered, or new."""
    if offered is None or offered.shape != (size,) or offered.dtype != like.dtype or not offered.is_contiguous():
        return like.new_empty(size)
    return offered


def _are_masks(*masks: Tensor) -> bool:
    return all(mask.dtype == torch.bool and mask.shape == masks[0].shape for mask in masks)


def _is_known(pattern: "Pattern") -> bool:
    """
    Whether the extension knows the types of a structure.

    Raises:
        IndexError: if it does, and the structure points outside of its layer.
    """
    known = is_laid_out(pattern)
    if known and not _is_sound(pattern):
        raise IndexError(
            f"The sets of a sparse layer of {pattern.shape[0]}×{pattern.shape[1]} point outside of it: its "
            "row_offsets and columns were damaged, or are those of another layer. Load a whole checkpoint."
        )
    return known


def _is_sound(pattern: "Pattern") -> bool:
    return extension.is_sound(structure(pattern), pattern.columns.numel())
