"""The active and the exploration set of one layer as one CSR structure."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..native import accelerated_by
from . import passes


INT16_MAX = torch.iinfo(torch.int16).max
INT32_MAX = torch.iinfo(torch.int32).max
# Sides of blocks that tensor cores multiply as they are: multiples of this.
GRAIN = 16


def index_dtype(largest: int) -> torch.dtype:
    """Smallest signed integer type of at least 16 bits that holds `largest`."""
    if largest <= INT16_MAX:
        return torch.int16
    return torch.int32 if largest <= INT32_MAX else torch.int64


class Pattern(NamedTuple):
    """
    Where the |B| stored values of an (out, in) weight stand.

    The weight is a grid of blocks, of single weights unless `block_size` says otherwise, and a set holds whole blocks.
    It is kept as the CSR structure of a matrix of twice as many rows: first the rows of A, then those of B\\A, columns
    ascending in each. So the values of A are a prefix of all values, each set is walked in the order of memory, and
    neither a second index nor a mask is needed. Inside a block, values stand row by row. A value's place in this order
    is called its slot.

    Args:
        row_offsets (`torch.Tensor`): int32 (int64 past 2³¹ blocks), (2·rows + 1,), with `rows` the rows of blocks: row
            r of A owns blocks `row_offsets[r]:row_offsets[r + 1]`, and row r of B\\A comes `rows` places later.
        columns (`torch.Tensor`): int16 where they fit, else int32; (blocks,); the column of each, counted in blocks.
        shape (`tuple[int, int]`): (out, in) of the weight.
        block_size (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): (rows, columns) of a block.
        column_walk (`torch.Tensor`, *optional*): what [`Pattern.walk_by_columns`] returns, where it is kept.
    """

    row_offsets: Tensor
    columns: Tensor
    shape: tuple[int, int]
    block_size: tuple[int, int] = (1, 1)
    column_walk: Tensor | None = None

    @classmethod
    def from_masks(cls, active: Tensor, backward: Tensor, block_size: tuple[int, int] = (1, 1)) -> "Pattern":
        """
        Builds the structure from two bool masks of shape (out, in), with `active` inside `backward`.

        Raises:
            ValueError: if a mask is not made of whole blocks.
        """
        block_size = tuple(block_size)
        column_dtype = index_dtype(active.shape[1] // block_size[1] - 1)
        row_offsets, columns = row_structure(active, backward, block_size, column_dtype)
        row_offsets = row_offsets.to(torch.int32 if columns.numel() <= INT32_MAX else torch.int64)
        pattern = cls(row_offsets, columns, tuple(active.shape), block_size)
        return pattern._replace(column_walk=pattern.walk_by_columns()) if pattern.fills_tiles else pattern

    @property
    def numel(self) -> int:
        """Number of weights of the layer, n."""
        return self.shape[0] * self.shape[1]

    @property
    def stored(self) -> int:
        """Number of values, |B|."""
        return self.columns.numel() * self._block_numel

    @property
    def active(self) -> int:
        """Number of values that belong to A, |A|: the first ones."""
        return int(self.row_offsets[len(self.row_offsets) // 2]) * self._block_numel

    @property
    def _block_numel(self) -> int:
        return self.block_size[0] * self.block_size[1]

    def flat_index(self) -> Tensor:
        """Position of each slot in the flattened (out, in) weight: int64, (|B|,)."""
        (height, width), in_features = self.block_size, self.shape[1]
        rows = torch.arange(self.shape[0] // height, device=self.columns.device).repeat(2)
        rows = rows.repeat_interleave(self.row_offsets.diff(), output_size=self.columns.numel())
        corners = rows.mul_(height * in_features).add_(self.columns, alpha=width)
        if self._block_numel == 1:
            return corners
        ids = [torch.arange(size, device=corners.device) for size in self.block_size]
        return (corners[:, None, None] + (ids[0][:, None] * in_features + ids[1])).flatten()

    @property
    def fills_tiles(self) -> bool:
        """Whether tensor cores multiply its blocks as they are."""
        return all(side % GRAIN == 0 for side in self.block_size)

    def walk_by_columns(self) -> Tensor:
        """
        The blocks of A column by column, as products by αᵀ on tensor cores need them: a CSC index of values that stay
        where they are. It has room for all of B, so that its size does not depend on |A|.

        Returns:
            `torch.Tensor`: int32, (columns + 1 + 2·blocks,), one after the other: where in the two lists each column
            begins, with their end; the rows of the blocks; their places among the blocks stored.
        """
        rows, columns = (size // side for size, side in zip(self.shape, self.block_size))
        places = torch.arange(self.columns.numel(), dtype=self.row_offsets.dtype, device=self.columns.device)
        lines = torch.searchsorted(self.row_offsets, places, right=True) - 1
        keys = torch.where(lines < rows, self.columns.int(), columns)
        keys, order = keys.sort(stable=True)
        begins = torch.searchsorted(keys, torch.arange(columns + 1, dtype=keys.dtype, device=keys.device))
        return torch.cat([begins, lines[order], order]).int()

    def cuts(self, parts: int) -> list[int]:
        """
        Where so many equal ranges of rows begin among the blocks stored: of A, then of B\\A, and the end. It waits for
        a GPU, once.
        """
        return self.row_offsets[:: len(self.row_offsets) // 2 // parts].tolist()

    def active_part(self, rows: range, begin: int, end: int) -> "Pattern":
        """
        A of some rows of blocks as a pattern by itself, which copies no columns.

        Args:
            rows (`range`): the rows of blocks.
            begin, end (`int`): which of the blocks stored are theirs in A, see [`Pattern.cuts`].
        """
        offsets = self.row_offsets.new_full((2 * len(rows) + 1,), end - begin)
        torch.sub(self.row_offsets[rows.start : rows.stop], begin, out=offsets[: len(rows)])
        return Pattern(offsets, self.columns[begin:end], self._part_shape(rows), self.block_size)

    def part(self, rows: range, active: slice, exploring: slice) -> "Pattern":
        """
        A and B\\A of some rows of blocks as a pattern by itself, with a copy of their columns.

        Args:
            rows (`range`): the rows of blocks.
            active, exploring (`slice`): which of the blocks stored are theirs in A and in B\\A, see [`Pattern.cuts`].
        """
        lines = len(self.row_offsets) // 2
        count = active.stop - active.start
        first = self.row_offsets[rows.start : rows.stop] - active.start
        second = self.row_offsets[lines + rows.start : lines + rows.stop + 1] - (exploring.start - count)
        columns = torch.cat([self.columns[active], self.columns[exploring]])
        return Pattern(torch.cat([first, second]), columns, self._part_shape(rows), self.block_size)

    def _part_shape(self, rows: range) -> tuple[int, int]:
        return len(rows) * self.block_size[0], self.shape[1]

    def active_mask(self) -> Tensor:
        """A as a bool mask of shape (out, in)."""
        return mask_of(self, whole=False)

    def backward_mask(self) -> Tensor:
        """B as a bool mask of shape (out, in)."""
        return mask_of(self, whole=True)


@accelerated_by(passes.row_structure)
def row_structure(
    active: Tensor, backward: Tensor, block_size: tuple[int, int], column_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """
    `row_offsets`, in 64 bits, and `columns` of the pattern of two masks, see [`Pattern.from_masks`].

    Raises:
        ValueError: if a mask is not made of whole blocks.
    """
    height, width = block_size
    masks = torch.cat([active, backward & ~active])
    sets = masks[::height, ::width]
    if height * width > 1 and not torch.equal(spread_blocks(sets, block_size), masks):
        raise ValueError(f"The sets are not made of whole blocks of {height}×{width} weights.")
    row_offsets = torch.zeros(len(sets) + 1, dtype=torch.int64, device=sets.device)
    torch.cumsum(sets.sum(1), 0, out=row_offsets[1:])
    return row_offsets, sets.nonzero()[:, 1].to(column_dtype)


@accelerated_by(passes.mask_of)
def mask_of(pattern: Pattern, whole: bool) -> Tensor:
    """A, or B with `whole`, as a bool mask of shape (out, in)."""
    flat = pattern.flat_index()
    mask = torch.zeros(pattern.numel, dtype=torch.bool, device=flat.device)
    mask[flat if whole else flat[: pattern.active]] = True
    return mask.view(pattern.shape)


@accelerated_by(passes.take_slots)
def take_slots(theta: Tensor, pattern: Pattern) -> Tensor:
    """The numbers of an (out, in) weight that `pattern` stores: (|B|,), in the order of its slots."""
    return theta.flatten()[pattern.flat_index()]


def slot_sources(old: Pattern, new: Pattern) -> Tensor:
    """
    Where each slot of `new` comes from: its slot in `old`, or -1 where the weight was not stored there.

    Returns:
        `torch.Tensor`: int32 (int64 past 2³¹ slots), (|B| of `new`,).
    """
    slot_dtype = passes.source_dtype(old)
    slots = torch.full((old.numel,), -1, dtype=slot_dtype, device=old.columns.device)
    slots[old.flat_index()] = torch.arange(old.stored, dtype=slot_dtype, device=slots.device)
    return slots[new.flat_index()]


@accelerated_by(passes.set_sizes)
def set_sizes(active: Tensor, backward: Tensor) -> tuple[int, int, int]:
    """|A|, |B|, and how many members of A are not in B, of two bool masks."""
    masks = active, backward, active & ~backward
    return tuple(int(mask.count_nonzero()) for mask in masks)


def blocks_of(active: Tensor, backward: Tensor, block_size: Sequence[int]) -> tuple[int, int]:
    """|A| and |B| in blocks, of two masks of weights."""
    in_a, in_b, _ = set_sizes(active, backward)
    return in_a // (block_size[0] * block_size[1]), in_b // (block_size[0] * block_size[1])


def spread_blocks(mask: Tensor, block_size: Sequence[int]) -> Tensor:
    """A mask of blocks as the mask of their weights: bool, (rows of blocks, columns of blocks) → (out, in)."""
    height, width = block_size
    return mask.repeat_interleave(width, 1).repeat_interleave(height, 0)  # in this order it copies whole rows


@accelerated_by(passes.pack_bits)
def pack_bits(mask: Tensor) -> Tensor:
    """Packs a bool mask, flattened, into bytes: uint8, (ceil(n / 8),); bit i of byte j is element 8·j + i."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (flat.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def pack_part(mask: Tensor, begin: int) -> tuple[int, Tensor]:
    """
    Packs a part of a mask, of which the elements from `begin` on are given: number of the first byte, and the bytes,
    uint8, in which bits of other parts are zero.
    """
    first, lead = divmod(begin, 8)
    return first, pack_bits(torch.nn.functional.pad(mask.flatten(), (lead, 0)) if lead else mask)


def unpack_part(packed: Tensor, begin: int, numel: int) -> Tensor:
    """So many elements from `begin` on of what [`pack_bits`] has packed: bool, (numel,)."""
    first, lead = divmod(begin, 8)
    return unpack_bits(packed[first : first - (-(lead + numel) // 8)], lead + numel)[lead:]


@accelerated_by(passes.unpack_bits)
def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Inverse of [`pack_bits`]: bool, (numel,)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten()[:numel].bool()
