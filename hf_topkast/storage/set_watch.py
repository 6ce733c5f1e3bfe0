"""
Notices sets that were not chosen for the values beside them.

A value's slot means another weight after each refresh. Who averages parameters or state dicts slot by slot, or copies
a model's buffers into another one as torch's `AveragedModel` does, mixes numbers of different weights.
"""

import torch
from torch import Tensor, nn

from .distributed import is_sharded, set_digest
from .pattern import Pattern


WAY_OUT = (
    "A slot means another weight after each refresh, so averages are taken of the full weights: use average_models "
    "for checkpoints, TopKastAveragedModel or TopKastEMACallback for a running average, and for a copy "
    "load_state_dict, which takes values and sets together."
)


class SetWatch(nn.Module):
    """
    The part of a sparse layer that knows which sets its values belong to.

    Attributes:
        sets_digest (`torch.Tensor`): float64, (4,), in [1, 2), on the host: what the sets are, for state dicts. In
            floating point, so that whatever averages state dicts averages it too, and what comes out is the digest of
            no sets; and no buffer, so that who copies buffers does not copy it.
    """

    _watched: tuple[Tensor, ...] = ()
    _writes = 0

    def _begin_watch(self, pattern: Pattern):
        self.sets_digest = encode(digest_of(pattern, self.row_stride))
        self._watch()

    def _note_digest(self, pattern: Pattern):
        """The values have just been given these sets."""
        self.sets_digest.copy_(encode(digest_of(pattern, self.row_stride)))
        self._watch()

    def _watch(self):
        """From now on whoever writes to the sets as they are is noticed, where each rank has them whole."""
        structure = self.row_offsets, self._buffers.get("columns")
        self._watched = () if any(part is None or is_sharded(part) for part in structure) else structure
        self._writes = self._count_writes()

    def _count_writes(self) -> int:
        try:
            return sum(part._version for part in self._watched)
        except RuntimeError:  # torch does not count for tensors made in inference mode
            self._watched = ()
            return 0

    def check_sets(self):
        """
        Whether the sets are those that the values were given.

        Raises:
            RuntimeError: if something else has written others in their place.
        """
        if torch.compiler.is_compiling():
            return
        writes = self._count_writes()
        if writes == self._writes or not self._watched:
            return
        row_offsets, columns = self._watched
        if row_offsets.is_meta or columns.is_meta:
            return
        sound = int(row_offsets[-1]) == columns.numel() and bool((row_offsets.diff() >= 0).all())
        pattern = Pattern(row_offsets, columns, self.matrix_shape, self.block_size)
        digest = encode(digest_of(pattern, self.row_stride)) if sound else None
        if digest is None or not _equal(digest, self.sets_digest):  # who writes a whole state has written it, too
            raise RuntimeError(
                f"The sets of a sparse layer of {self.matrix_shape[0]}×{self.matrix_shape[1]} were written over from "
                f"outside: the values belong to others. {WAY_OUT}"
            )
        self._writes = writes


def digest_of(pattern: Pattern, row_stride: int = 1) -> int:
    """A number that tells the sets of a pattern apart, see [`set_digest`], and those of grids in other orders."""
    row_offsets = pattern.row_offsets.to(pattern.columns.device)  # a load may be half done
    digest = int(set_digest(pattern._replace(row_offsets=row_offsets)))
    # By an odd number that changes all of its bits, for states may be rounded to few.
    return digest if row_stride == 1 else digest ^ (row_stride * 0x9E3779B97F4A7C15 & (1 << 63) - 1)


def encode(digest: int) -> Tensor:
    """A digest as four numbers in [1, 2), 16 bits each: float64, (4,)."""
    parts = [(digest >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    return torch.tensor(parts, dtype=torch.float64) / 2**16 + 1


def mixture(
    row_offsets: Tensor | None,
    columns: Tensor | None,
    saved: Tensor | None,
    shape: tuple[int, int],
    block_size: tuple[int, int],
    row_stride: int,
) -> str | None:
    """
    Says what shows that a layer's saved state was computed from several, so that its values belong to other sets.

    Args:
        row_offsets, columns (`torch.Tensor`, *optional*): the saved sets, as [`Pattern`] has them.
        saved (`torch.Tensor`, *optional*): the saved `sets_digest`, which may have been rounded to another dtype.
        shape (`tuple[int, int]`): (out, in) of the layer.
        block_size (`tuple[int, int]`): (rows, columns) of its blocks.
        row_stride (`int`): the order of the rows of their grid.

    Returns:
        `str`, *optional*: the end of a sentence; `None` if nothing shows it, or if a part is missing or elsewhere.
    """
    if row_offsets is None or columns is None:
        return None
    for name, part in (("row_offsets", row_offsets), ("columns", columns)):
        if part.is_floating_point() or part.is_complex():
            return f"its {name}, which say where values stand, are {part.dtype}: averaged, it seems. {WAY_OUT}"
    if saved is None and row_stride != 1:
        return "the state has no sets_digest, so its blocks are not scattered as this layer's are (scatter_blocks)."
    if saved is None or is_sharded(columns) or any(part.is_meta for part in (saved, row_offsets, columns)):
        return None
    if row_offsets.numel() != 2 * (shape[0] // block_size[0]) + 1 or int(row_offsets[-1]) != columns.numel():
        return None  # no sets of this layer, which is said in other words
    pattern = Pattern(row_offsets, columns, shape, block_size)
    if _equal(encode(digest_of(pattern, row_stride)), saved):
        return None
    if row_stride != 1 and _equal(encode(digest_of(pattern)), saved):
        return "its blocks are not scattered, and this layer's are: it was saved with another scatter_blocks."
    return (
        "the state's sets are not those that its values had: an average of states, it seems, or a layer with another "
        f"scatter_blocks. {WAY_OUT}"
    )


def _equal(digest: Tensor, saved: Tensor) -> bool:
    """Whether an encoded digest is the saved one, rounded to another dtype or averaged with its like."""
    tolerance = max(1e-12, 8 * torch.finfo(saved.dtype).eps) if saved.is_floating_point() else 0.0
    return saved.shape == digest.shape and torch.allclose(saved.cpu().double(), digest, rtol=0, atol=tolerance)
