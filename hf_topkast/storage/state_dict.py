"""What a sparse layer writes into state dicts, and how it takes them, also of other sets than its own."""

import torch
from torch import Tensor, nn

from .distributed import is_sharded
from .reservoir import NOWHERE
from .set_watch import mixture


STRUCTURE = ("row_offsets", "columns")


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
        if f"{prefix}values" in state_dict and not any(prefix + name in state_dict for name in STRUCTURE):
            errors.append(
                f"Layer '{prefix[:-1]}': the state has values and not the sets that they belong to, which may be "
                "others by now. Take model.state_dict(), which has both, and not the parameters alone."
            )
            return
        saved = (state_dict.get(prefix + name) for name in (*STRUCTURE, "sets_digest"))
        problem = mixture(*saved, self.matrix_shape, self.block_size) or self._fit_storage(state_dict, prefix)
        if problem:
            errors.append(f"Layer '{prefix[:-1]}': {problem}")
            return
        self.assignments += 1
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        assign = metadata.get("assign_to_params_buffers", False)
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

    def _load_digest(self, saved: Tensor | None, assign: bool):
        """That of the sets just loaded; the saved one, where they are cut or have no numbers yet."""
        if saved is not None and assign and saved.dtype == torch.float64:
            self.sets_digest = saved  # as its sets are those of the state, and change with them
        if not (is_sharded(self.columns) or self.columns.is_meta or self.row_offsets.is_meta):
            self._note_digest(self._pattern(self.columns))
        elif saved is not None:
            self.sets_digest.copy_(saved)
        self._watch()

    def _fit_storage(self, state_dict: dict, prefix: str) -> str | None:
        """Gives `values`, `columns` and `reservoir` the sizes of a saved state; says what makes that impossible."""
        sized = {name: state_dict.get(prefix + name) for name in ("values", "columns", "reservoir", "row_offsets")}
        if any(tensor is None for tensor in sized.values()):
            return None  # reported as missing keys by torch
        stored = sized["values"].numel()
        entries = stored // (self.block_size[0] * self.block_size[1])
        resting = 0 if self.reservoir_device == NOWHERE else self.numel - stored
        if sized["reservoir"].numel() != resting or sized["columns"].numel() != entries:
            kept = "that keeps no weights outside B" if self.reservoir_device == NOWHERE else "with all its weights"
            return (
                f"the state holds {stored} values, {sized['columns'].numel()} columns and "
                f"{sized['reservoir'].numel()} reservoir weights, which is not a layer of {self.numel} weights {kept}."
            )
        if sized["row_offsets"].shape != self.row_offsets.shape:
            return (
                f"the state has {sized['row_offsets'].numel()} row_offsets and this layer {self.row_offsets.numel()}: "
                f"it was saved with another block_size than {self.block_size}."
            )
        if int(sized["row_offsets"][-1]) != sized["columns"].numel():
            return (
                f"the state's row_offsets end at {int(sized['row_offsets'][-1])}, but it holds "
                f"{sized['columns'].numel()} columns."
            )
        for name in ("values", "columns", "reservoir"):
            if getattr(self, name).shape != sized[name].shape:
                self._write(name, sized[name].detach())
        return None
