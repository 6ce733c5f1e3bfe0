"""The active and the exploration set of one layer as one CSR structure."""

from dataclasses import dataclass

import torch
from torch import Tensor


INT16_MAX = torch.iinfo(torch.int16).max
INT32_MAX = torch.iinfo(torch.int32).max


def index_dtype(largest: int) -> torch.dtype:
    """Smallest signed integer type of at least 16 bits that holds `largest`."""
    if largest <= INT16_MAX:
        return torch.int16
    return torch.int32 if largest <= INT32_MAX else torch.int64


@dataclass(frozen=True)
class Pattern:
    """
    Where the |B| stored values of an (out, in) weight stand.

    Rows in CSR order; each row's A entries come first, then its B\\A entries, both by ascending column. The forward
    product and dX walk each row's prefix of `active_counts[row]` entries, dW|B walks the whole row: no second index
    and no mask is needed. An entry's place in this order is called its slot.

    Args:
        row_offsets (`torch.Tensor`): int32 (int64 past 2³¹ values), (out + 1,); row r owns slots
            `row_offsets[r]:row_offsets[r + 1]`.
        active_counts (`torch.Tensor`): integers, (out,); how many of a row's entries belong to A.
        columns (`torch.Tensor`): int16 where in_features allows, else int32, (|B|,).
        in_features (`int`): number of columns.
    """

    row_offsets: Tensor
    active_counts: Tensor
    columns: Tensor
    in_features: int

    @classmethod
    def from_masks(cls, active: Tensor, backward: Tensor) -> "Pattern":
        """Builds the structure from two bool masks of shape (out, in), with `active` inside `backward`."""
        out_features, in_features = active.shape
        exploration = backward & ~active
        active_per_row, exploration_per_row = active.sum(1), exploration.sum(1)
        row_offsets = torch.zeros(out_features + 1, dtype=torch.int64, device=active.device)
        torch.cumsum(active_per_row + exploration_per_row, 0, out=row_offsets[1:])
        stored = int(row_offsets[-1])

        columns = torch.empty(stored, dtype=index_dtype(in_features - 1), device=active.device)
        # Entries of both sets come row by row, so an entry's slot is its own rank plus the entries of the other set
        # that stand before it: those of earlier rows for A, those of the same row too for B\A.
        for members, others_before in (
            (active, exploration_per_row.cumsum(0) - exploration_per_row),
            (exploration, active_per_row.cumsum(0)),
        ):
            rows, cols = members.nonzero(as_tuple=True)
            slots = torch.arange(rows.numel(), device=active.device) + others_before[rows]
            columns[slots] = cols.to(columns.dtype)
        return cls(
            row_offsets=row_offsets.to(torch.int32 if stored <= INT32_MAX else torch.int64),
            active_counts=active_per_row.to(index_dtype(in_features)),
            columns=columns,
            in_features=in_features,
        )

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.active_counts.numel()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.out_features, self.in_features

    @property
    def numel(self) -> int:
        """Number of weights of the layer, n."""
        return self.out_features * self.in_features

    def rows(self) -> Tensor:
        """Row of each slot: int64, (|B|,)."""
        lengths = self.row_offsets.diff()
        ids = torch.arange(self.out_features, device=lengths.device)
        return ids.repeat_interleave(lengths, output_size=self.columns.numel())

    def flat_index(self) -> Tensor:
        """Position of each slot in the flattened (out, in) weight: int64, (|B|,)."""
        return self.rows().mul_(self.in_features).add_(self.columns)

    def active_slots(self) -> Tensor:
        """Which slots belong to A: bool, (|B|,)."""
        lengths = self.row_offsets.diff()
        active = self.active_counts.to(lengths.dtype)
        runs = torch.stack([active, lengths - active], dim=1).flatten()  # each row: a run of A, then one of B\A
        kinds = torch.tensor([True, False], device=runs.device).repeat(self.out_features)
        return kinds.repeat_interleave(runs, output_size=self.columns.numel())

    def active_mask(self) -> Tensor:
        """A as a bool mask of shape (out, in)."""
        return self._mask(self.flat_index()[self.active_slots()])

    def backward_mask(self) -> Tensor:
        """B as a bool mask of shape (out, in)."""
        return self._mask(self.flat_index())

    def _mask(self, flat: Tensor) -> Tensor:
        mask = torch.zeros(self.numel, dtype=torch.bool, device=flat.device)
        mask[flat] = True
        return mask.view(self.shape)


def slot_sources(old: Pattern, new: Pattern) -> Tensor:
    """
    Where each slot of `new` comes from: its slot in `old`, or -1 where the weight was not stored there.

    Returns:
        `torch.Tensor`: int64, (|B| of `new`,).
    """
    slot_dtype = old.row_offsets.dtype
    slots = torch.full((old.numel,), -1, dtype=slot_dtype, device=old.columns.device)
    slots[old.flat_index()] = torch.arange(old.columns.numel(), dtype=slot_dtype, device=slots.device)
    return slots[new.flat_index()].long()


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a bool mask, flattened, into bytes: uint8, (ceil(n / 8),); bit i of byte j is element 8·j + i."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (flat.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Inverse of [`pack_bits`]: bool, (numel,)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten()[:numel].bool()
