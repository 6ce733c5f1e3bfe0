"""The walk by columns of a layer, kept beside its sets, and used only while it is theirs."""

import torch
from torch import Tensor, nn

from .distributed import is_sharded
from .in_place import rewrite


class ColumnWalk(nn.Module):
    """
    The part of a sparse layer that keeps what dX on tensor cores needs beside `row_offsets` and `columns`.

    A walk of other sets would give wrong gradients without a word. So it is made anew where the layer changes its sets
    or loads them; and where anything else has written to them by torch's operations, or has put others in their place
    as `torch.func.functional_call` does, the layer hands out none, and each dX makes its own.

    Attributes:
        column_walk (`torch.Tensor`, *optional*): see [`Pattern.walk_by_columns`]; `None` where blocks do not fill the
            tiles of tensor cores. Not saved.
    """

    _noted, _noted_versions = (), ()

    def _begin_walk(self, walk: Tensor | None):
        self.register_buffer("column_walk", walk, persistent=False)
        if walk is not None:
            self._note_sets()

    def _keep_walk(self, walk: Tensor, assign: bool = False):
        """Of the sets as they are: in the place of the former one, or itself if the sets were assigned too."""
        if assign:
            self.column_walk = walk
        else:
            rewrite(self, "column_walk", walk)
        self._note_sets()

    def _make_walk(self, assign: bool = False):
        """Of sets that a load or a copy brought. If FSDP2 has cut them, the next refresh does it, with all ranks."""
        self._noted = ()
        here = not is_sharded(self.columns) and self.columns.device == self.row_offsets.device
        if self.column_walk is not None and here:
            self._keep_walk(self.pattern.walk_by_columns(), assign)

    def _current_walk(self) -> Tensor | None:
        return self.column_walk if self.column_walk is not None and self._sets_are_noted() else None

    def _sets(self) -> tuple[Tensor, ...]:
        """Without columns that are a parameter: FSDP2 has another tensor of them for each product."""
        columns = self._buffers.get("columns")
        return (self.row_offsets,) if columns is None else (self.row_offsets, columns)

    def _note_sets(self):
        self._noted = self._sets()
        self._noted_versions = tuple(_version(tensor) for tensor in self._noted)

    def _sets_are_noted(self) -> bool:
        """Whether the sets are the noted tensors, and no one has written to them since."""
        sets = self._sets()
        if len(self._noted) != len(sets) or any(noted is not now for noted, now in zip(self._noted, sets)):
            return False
        # Versions are not for graphs.
        return torch.compiler.is_compiling() or self._noted_versions == tuple(_version(tensor) for tensor in sets)

    def _apply(self, fn, recurse=True):
        # What comes back from the meta device has no numbers yet.
        noted = not self.row_offsets.is_meta and self._sets_are_noted()
        super()._apply(fn, recurse)
        if noted:
            self._note_sets()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._make_walk(assign=True)  # `copy.copy` shares the former one


def _version(tensor: Tensor) -> int | None:
    """How often a tensor has been written to, which torch does not count for those made in inference mode."""
    try:
        return tensor._version
    except RuntimeError:
        return None
