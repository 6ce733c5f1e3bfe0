"""What a sparse layer stores: its numbers, the sets A and B, and how both are changed, moved, saved and loaded."""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..block_order import row_stride
from .change import Change
from .column_walk import ColumnWalk
from .distributed import SHARDS_INTEGERS, full, is_sharded, local, part_of, shard_like
from .in_place import rewrite
from .moment import Moment, scored
from .parts import Part, parts_of
from .pattern import Pattern, blocks_of, pack_bits, take_slots
from .reservoir import NOWHERE, assemble_theta, put_to_rest, take_reservoir
from .resharding import reshard
from .scattering import from_grid, to_grid
from .set_watch import SetWatch
from .state_dict import STRUCTURE, StoredState


logger = logging.get_logger(__name__)

# Every sparse layer that there is.
LIVING: "weakref.WeakSet[SparseStorage]" = weakref.WeakSet()

TRACKING = ("unvisited", "initial_reservoir_size")


class SparseStorage(StoredState, ColumnWalk, SetWatch):
    """
    What all sparse layers store. Inside, every weight is (out, in), its rows in the order of the grid of blocks; the
    stock layout is that of the replaced layer.

    Attributes:
        values (`torch.nn.Parameter`): θ on B, (|B|,), in the slot order of `pattern`, A before B\\A; one object for
            life.
        row_offsets, columns (`torch.Tensor`): the buffers behind `pattern`.
        reservoir (`torch.Tensor`): θ outside B, (n − |B|,), by ascending flat index of the (out, in) weight. A buffer,
            or with another `reservoir_device` than `"same"` a tensor that stays on the host when the layer moves.
            Under FSDP2, once `shard_rest` was called, a DTensor of which each rank holds its part; so is `unvisited`.
            With `reservoir_device="nowhere"` it is empty, and θ is zero outside B.
        unvisited (`torch.Tensor`): packed bits, (ceil(n / 8),): which members of the first reservoir were never in A.
        initial_reservoir_size (`torch.Tensor`): int64 scalar, how many members that reservoir had.
        input_norms (`torch.Tensor`, *optional*): root mean square of each input feature, (in,), or of experts
            (experts, in), with which weights are scored; `None` where magnitudes alone count.
        assignments (`int`): counts up when the slots begin to get other weights, and again when they have them: a
            controller sees what it did not do itself, and a thread that saves whether it read one state or two.
        matrices (`int`): how many there are, one below the other: as many as experts, else one.
        row_stride (`int`): the order of the rows of each matrix in the grid; 1 unless blocks are scattered.
    """

    stores_transposed = False
    matrices = 1
    row_stride = 1

    def _store(
        self,
        dense: nn.Module,
        active: Tensor,
        backward: Tensor,
        reservoir_device: str,
        block_size: tuple[int, int],
        scatter_blocks: bool,
    ):
        """Takes over the weights of `dense`; `active` and `backward` are bool masks of shape (out, in)."""
        self.reservoir_device, self.block_size = reservoir_device, tuple(block_size)
        self.row_stride = row_stride(self.matrix_shape[0] // self.matrices, self.block_size[0], scatter_blocks)
        theta = self.to_grid(dense.weight.detach())
        self.assignments = 0
        self._handles: dict[str, Any] = {}
        self._counted = None
        LIVING.add(self)
        pattern = Pattern.from_masks(active, backward, self.block_size)
        self.values = nn.Parameter(take_slots(theta, pattern), requires_grad=dense.weight.requires_grad)
        for name in STRUCTURE:
            self.register_buffer(name, getattr(pattern, name))
        self._begin_walk(pattern.column_walk)
        self._begin_watch(pattern)
        reservoir = take_reservoir(theta, backward, reservoir_device)
        if self._rests_elsewhere:
            self.reservoir = put_to_rest(reservoir, reservoir_device)
        else:
            self.register_buffer("reservoir", reservoir)
        self.register_buffer("unvisited", pack_bits(~backward))
        self.register_buffer("initial_reservoir_size", torch.tensor(self.numel - self.values.numel()))
        self.register_buffer("input_norms", None)

    @property
    def pattern(self) -> Pattern:
        """Where the values stand, and which belong to A."""
        self.check_sets()
        return self._pattern(full(self.columns))

    def _pattern(self, columns: Tensor) -> Pattern:
        return Pattern(self.row_offsets, columns, self.matrix_shape, self.block_size, self._current_walk())

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in), whatever the stock layout."""
        in_features, out_features = self._features()
        return out_features, in_features

    @property
    def numel(self) -> int:
        """Number of weights of the layer, n."""
        in_features, out_features = self._features()
        return in_features * out_features

    @property
    def active_count(self) -> int:
        """|A|."""
        # Once for each assignment: reading it off a GPU at every step would make the host wait for the GPU.
        if self._counted is None or self._counted[0] != self.assignments:
            self._counted = self.assignments, self._pattern(self.columns).active
        return self._counted[1]

    def theta(self, reservoir: Tensor | None = None) -> Tensor:
        """θ as (out, in), its rows in the order of the grid: a copy; from a copy of the reservoir if one is given."""
        reservoir = self.reservoir if reservoir is None else reservoir
        return assemble_theta(full(self.values.detach()), self.pattern, full(reservoir))

    def scored(self, theta: Tensor | None = None) -> Tensor:
        """What ranks the weights, as (out, in): θ, or a θ given, by the norms of its inputs if the layer has them."""
        return scored(self.theta() if theta is None else theta, self.input_norms)

    def stored(self) -> Moment:
        """θ as it is stored now: no copy, but of what FSDP2 has sharded, for which every rank has to call."""
        values, rest = full(self.values.detach()), full(self.reservoir)
        return Moment(values, self.pattern, rest, self.input_norms, self.matrices)

    def moment(self) -> Moment:
        """
        θ as it is now, on the device where the reservoir rests, for a thread to read while training goes on. Values
        and pattern are copied; the reservoir, which only a refresh changes, is not.
        """
        own = {"device": self.reservoir.device, "copy": True}
        pattern = Pattern(self.row_offsets.to(**own), self.columns.to(**own), self.matrix_shape, self.block_size)
        norms = None if self.input_norms is None else self.input_norms.to(**own)
        return Moment(self.values.detach().to(**own), pattern, self.reservoir.detach(), norms, self.matrices)

    @property
    def parts(self) -> list[Part]:
        """Where each matrix stands in what is stored."""
        return parts_of(self._pattern(self.columns), self.matrices)

    def rests(self) -> Iterator[Tensor | None]:
        """What each matrix has in the reservoir, sharing memory; `None` where FSDP2 has sharded it."""
        for part in self.parts:
            yield None if is_sharded(self.reservoir) else self.reservoir[part.rest]

    @torch.no_grad()
    def reassign(self, active: Tensor, backward: Tensor, theta: Tensor | None = None):
        """
        Makes `active` and `backward` the sets A and B; every weight keeps its number. The parameter stays the same
        object, and its gradient moves with the weights: one that enters B has none, 0.

        Args:
            active, backward (`torch.Tensor`): bool, (out, in) as the grid has it, the first inside the second.
            theta (`torch.Tensor`, *optional*): (out, in), alike; replaces the layer's own θ.
        """
        masks = list(zip(active.chunk(self.matrices), backward.chunk(self.matrices)))
        thetas = [None] * self.matrices if theta is None else theta.chunk(self.matrices)
        with Change(self, [blocks_of(*pair, self.block_size) for pair in masks]) as change:
            for place, pair in enumerate(masks):
                change.give(change.former.matrix(place, theta=thetas[place]), *pair)

    def offer_columns(self):
        """
        Makes `columns` a parameter without gradient, the only kind of tensor that FSDP2 shards and gathers for a
        product. Call it before the model is wrapped; else every rank keeps all columns, as it does up to torch 2.11.
        """
        if not SHARDS_INTEGERS:
            logger.warning_once(
                f"The FSDP2 of torch {torch.__version__} shards no integers, so every rank keeps all columns of the "
                "sparse layers, 2 bytes for each weight of B. From torch 2.12 on it keeps its part."
            )
        elif "columns" in self._buffers:
            self.columns = nn.Parameter(self._buffers.pop("columns"), requires_grad=False)
            self._make_walk()
            self._watch()

    def shard_rest(self, handles: Mapping[tuple[nn.Module, str], Any]):
        """
        Keeps this rank's part of what only a refresh needs, once FSDP2 has cut `values`: gathered then.

        Args:
            handles (`Mapping`): by which the sizes of sharded parameters may change, see [`find_handles`].
        """
        self._handles = {name: handles[self, name] for name in ("values", "columns") if (self, name) in handles}
        if is_sharded(self.values) and not is_sharded(self.unvisited):
            self.unvisited = shard_like(self.unvisited, self.values)
            if self.reservoir_device != NOWHERE:
                self.reservoir = shard_like(self.reservoir, self.values)
            if self._rests_elsewhere:
                self.reservoir = put_to_rest(self.reservoir, self.reservoir_device)

    def has_gradient(self) -> bool:
        """Whether a gradient has come to `values` since it was cleared last, wherever FSDP2 keeps it meanwhile."""
        kept = [self.values.grad]
        if "values" in self._handles:
            handle = self._handles["values"]
            kept += [handle.sharded_param.grad, handle.unsharded_accumulated_grad]
        return any(gradient is not None for gradient in kept)

    @property
    def _rests_elsewhere(self) -> bool:
        return self.reservoir_device not in ("same", NOWHERE)

    def _write(self, name: str, new: Tensor):
        current = getattr(self, name)
        if not is_sharded(current) and new.numel() and new.data_ptr() == current.data_ptr() != 0:  # written already
            torch.autograd.graph.increment_version(current)
            return
        resized = current.shape != new.shape
        if is_sharded(current) and resized:
            self._reshard(name, new)
        elif is_sharded(current):
            local(current).copy_(part_of(new, current))
        elif resized and name == "reservoir" and self._rests_elsewhere:
            self.reservoir = put_to_rest(new, self.reservoir_device)
        else:
            rewrite(self, name, new)

    def _reshard(self, name: str, new: Tensor):
        if name == "reservoir":
            self.reservoir = shard_like(new, self.reservoir)
            if self._rests_elsewhere:
                self.reservoir = put_to_rest(self.reservoir, self.reservoir_device)
        elif name in self._handles:
            reshard(self._handles[name], new)
        else:
            raise RuntimeError(
                f"FSDP2 has sharded the {getattr(self, name).numel()} {name} of a sparse layer, which cannot become "
                f"{new.numel()} without a TopKastController: load sets of other sizes before the model is sharded, as "
                "TopKastTrainer does."
            )

    def _apply(self, fn, recurse=True):
        unseen = self._count_writes() != self._writes
        super()._apply(fn, recurse)
        self._watch()
        if unseen:
            self._writes = -1  # look at the next use
        if self._rests_elsewhere and self.reservoir.dtype != self.values.dtype:
            self.reservoir = put_to_rest(self.reservoir.to(self.values.dtype), self.reservoir_device)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        LIVING.add(self)
        self._watch()
        self._writes = -1  # a copy of sets that were written over is no better: look at its first use
        if self._rests_elsewhere:  # a copy comes in memory: back to where it rests
            self.reservoir = put_to_rest(self.reservoir, self.reservoir_device)

    @property
    def stock_shape(self) -> tuple[int, ...]:
        """Shape of the weight in the stock layout."""
        return self.matrix_shape[::-1] if self.stores_transposed else self.matrix_shape

    @staticmethod
    def stock_name(name: str) -> str:
        """The name in a dense model's state dict of the weight of the layer of this name."""
        return f"{name}.weight"

    def to_grid(self, stock: Tensor) -> Tensor:
        """A weight from the stock layout to that in which the layer keeps it."""
        return to_grid(self.to_rows(stock), self.row_stride, self.matrices)

    def from_grid(self, grid: Tensor) -> Tensor:
        """A weight from the layout in which the layer keeps it to the stock layout."""
        return self.to_stock(from_grid(grid, self.row_stride, self.matrices))

    @classmethod
    def to_rows(cls, stock: Tensor) -> Tensor:
        """A weight from the stock layout to (out, in), in the features' own order."""
        return stock.T.contiguous() if cls.stores_transposed else stock

    @classmethod
    def to_stock(cls, rows: Tensor) -> Tensor:
        """A weight from (out, in), in the features' own order, to the stock layout."""
        return rows.T.contiguous() if cls.stores_transposed else rows
