"""The walk by columns of a layer, kept beside its sets, and used only while it is theirs."""

import torch
from torch import Tensor, nn

from .distributed import is_sharded
from .in_place import rewrite


class ColumnWalk(nn.Module):
    """
    The part of a sparse layer that keeps what dX on tensor cores needs beside `row_offsets` and `columns`.

    A walk of other sets would give wrong gradients without a word. So it is made anew where the layer changes its sets
    or loads them, and where anything else has written to them or put others in their place, as
    `torch.func.functional_call` does, the layer hands out none, and each dX makes its own.

    Attributes:
        column_walk (`torch.Tensor`, *optional*): see [`Pattern.walk_by_columns`]; `None` where blocks do not fill the
            tiles of tensor cores. Not saved.
    """

    def _begin_walk(self, walk: Tensor | None):
        self.register_buffer("column_walk", walk, persistent=False)
        self._note_sets()

    def _keep_walk(self, walk: Tensor, assign: bool = False):
        """Of the sets as they are: in the place of the former one, or itself if the sets were assigned too."""
        if assign:
            self.column_walk = walk
        else:
            rewrite(self, "column_walk", walk)
        self._note_sets()

    def _make_walk(self, assign: bool = False):
        """For a load or a copy. Of columns that FSDP2 has cut, the next refresh does it, where all ranks meet."""
        self._noted = None
        if not is_sharded(self.columns) and self.columns.device == self.row_offsets.device:
            self._keep_walk(self.pattern.walk_by_columns(), assign)

    def _current_walk(self) -> Tensor | None:
        return self.column_walk if self.column_walk is not None and self._sets_are_noted() else None

    def _note_sets(self):
        self._noted, self._noted_version = self.row_offsets, _version(self.row_offsets)

    def _sets_are_noted(self) -> bool:
        """Whether `row_offsets` is the noted tensor, and no one has written to it since."""
        if self._noted is not self.row_offsets:
            return False
        return torch.compiler.is_compiling() or self._noted_version == _version(self.row_offsets)

    def _apply(self, fn, recurse=True):
        noted = self._sets_are_noted()
        super()._apply(fn, recurse)
        if noted:
            self._note_sets()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.column_walk is not None:
            self._make_walk()


def _version(tensor: Tensor) -> int | None:
    """How often a tensor has been written to, which is not counted for those made in inference mode."""
    return None if tensor.is_inference() else tensor._version
