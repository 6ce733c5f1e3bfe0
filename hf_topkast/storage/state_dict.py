"""What a sparse layer writes into state dicts, and how it takes them, also of other sets than its own."""

import torch
from torch import Tensor, nn

from .distributed import is_sharded
from .reservoir import NOWHERE
from .set_watch import mixture


STRUCTURE = ("row_offsets", "columns")
PARTS = ("values", "reservoir", *STRUCTURE)


def dense_state(name: str, stock: str) -> str:
    """What is wrong with a state dict that has the dense weight `stock` of a sparse layer."""
    return (
        f"Layer '{name}' is sparse, but the state dict holds a dense '{stock}' for it. To go on from a saved "
        "checkpoint directory use from_pretrained, or TopKastTrainer to resume training; to start from dense weights "
        "load them first and sparsify the model afterwards."
    )


class StoredState(nn.Module):
    """The part of a sparse layer that goes through state dicts: it has the attributes of `SparseStorage`."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}sets_digest"] = self.sets_digest
        if is_sharded(self.columns):  # which gloo can only gather in 32 bits
            destination[f"{prefix}columns"] = self.columns.to(torch.int32)
        if self._rests_elsewhere:
            destination[f"{prefix}reservoir"] = self.reservoir

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        stock = self.stock_name(prefix[:-1])
        if stock in state_dict and f"{prefix}values" not in state_dict:
            errors.append(dense_state(prefix[:-1], stock))
            return
        self._add_empty_reservoir(state_dict, prefix)
        absent = [name for name in PARTS if prefix + name not in state_dict]
        assign = metadata.get("assign_to_params_buffers", False)
        if len(absent) == len(PARTS):  # weights of others, or a bias
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
            return
        if absent and not assign:  # with it they may come one by one
            named = ", ".join(f'"{prefix}{name}"' for name in absent)
            errors.append(
                f"Missing key(s) {named}: values, reservoir and sets of layer '{prefix[:-1]}' belong together, and "
                "its own may be others by now. Take model.state_dict(), which has all, and not the parameters alone."
            )
            return
        saved = (state_dict.get(prefix + name) for name in (*STRUCTURE, "sets_digest"))
        problem = (
            self._other_layer(state_dict, prefix)
            or mixture(*saved, self.matrix_shape, self.block_size, self.row_stride)
            or self._fit_storage(state_dict, prefix)
        )
        if problem:
            errors.append(f"Layer '{prefix[:-1]}': {problem}")
            return
        self.assignments += 1
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if any(prefix + name in state_dict for name in STRUCTURE):
            self._load_digest(state_dict.get(f"{prefix}sets_digest"), assign)
            self._make_walk(assign)
        self.assignments += 1
        # No buffers, so torch does not know the keys.
        unexpected[:] = [key for key in unexpected if key not in (f"{prefix}reservoir", f"{prefix}sets_digest")]
        if self._rests_elsewhere:
            if f"{prefix}reservoir" in state_dict:
                self.reservoir.copy_(state_dict[f"{prefix}reservoir"])
            elif strict:
                missing.append(f"{prefix}reservoir")

    def _add_empty_reservoir(self, state_dict: dict, prefix: str):
        """Accelerate takes all empty tensors for one that is shared, and saves the first: the others have nothing."""
        values = state_dict.get(f"{prefix}values")
        if values is None or f"{prefix}reservoir" in state_dict or is_sharded(self.values):
            return
        if self.reservoir_device == NOWHERE or values.numel() == self.numel:
            state_dict[f"{prefix}reservoir"] = values.new_empty(0)

    def _load_digest(self, saved: Tensor | None, assign: bool):
        """That of the sets just loaded; the saved one, where they are cut or have no numbers yet."""
        if saved is not None and assign and saved.dtype == torch.float64:
            self.sets_digest = saved  # as its sets are those of the state, and change with them
        if not (is_sharded(self.columns) or self.columns.is_meta or self.row_offsets.is_meta):
            self._note_digest(self._pattern(self.columns))
        elif saved is not None:
            self.sets_digest.copy_(saved)
        self._watch()

    def _sized(self, state_dict: dict, prefix: str) -> dict[str, Tensor] | None:
        """What has sizes of its own in a saved state; `None` if a part is missing, which torch reports."""
        sized = {name: state_dict.get(prefix + name) for name in ("values", "columns", "reservoir", "row_offsets")}
        return None if any(tensor is None for tensor in sized.values()) else sized

    def _other_layer(self, state_dict: dict, prefix: str) -> str | None:
        """Says what shows that a saved state is of a layer of another size, or of other blocks."""
        sized = self._sized(state_dict, prefix)
        if sized is None:
            return None
        stored, columns, resting, offsets = (
            sized[name].numel() for name in ("values", "columns", "reservoir", "row_offsets")
        )
        block = self.block_size[0] * self.block_size[1]
        if offsets != self.row_offsets.numel() or columns * block != stored:
            return (
                f"the state has {offsets} row_offsets, {columns} columns and {stored} values, and this layer "
                f"{self.row_offsets.numel()} row_offsets and {block} values a column: it was saved with another "
                f"block_size than {self.block_size}, or is of another layer."
            )
        if resting != (0 if self.reservoir_device == NOWHERE else self.numel - stored):
            kept = "that keeps no weights outside B" if self.reservoir_device == NOWHERE else "with all its weights"
            return (
                f"the state holds {stored} values and {resting} reservoir weights, which is not a layer of "
                f"{self.numel} weights {kept}."
            )
        return None

    def _fit_storage(self, state_dict: dict, prefix: str) -> str | None:
        """Gives `values`, `columns` and `reservoir` the sizes of a saved state; says what makes that impossible."""
        sized = self._sized(state_dict, prefix)
        if sized is None:
            return None
        end, columns = int(sized["row_offsets"][-1]), sized["columns"].numel()
        if end != columns:
            return f"the state's row_offsets end at {end}, but it holds {columns} columns."
        for name in ("values", "columns", "reservoir"):
            if getattr(self, name).shape != sized[name].shape:
                self._write(name, sized[name].detach())
        return None
