"""What a checkpoint's headers tell of its sparsity."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..headers import FileHeader, count_bits, count_nonzero
from .checkpoint import Checkpoint


# A value, its gradient and two Adam moments; with new_state="fresh" a count of its own steps as well.
COPIES_IN_TRAINING = 4
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# What the state file holds of a layer.
KINDS = ("active", "backward", "rest", "unvisited", "initial_reservoir_size", "input_norms", "values")


@dataclass
class LayerSummary:
    """
    One sparse layer of a checkpoint; in a dense one, a tensor whose zeros were counted.

    Attributes:
        name (`str`): in the model that wrote it.
        shape (`list[int]`): (out, in), of experts that of one; of a dense tensor its own.
        dtype (`str`): as safetensors names it.
        weights, active, stored (`int`): n, |A| and |B|.
        file_bytes (`int`): its bytes in all files.
        training_bytes (`int`, *optional*): values, gradients, two Adam moments, indices and reservoir in training.
        experts (`int`, *optional*): how many there are; `None` where it is one matrix.
    """

    name: str
    shape: list[int]
    dtype: str
    weights: int
    active: int
    stored: int
    file_bytes: int
    training_bytes: int | None = None
    experts: int | None = None

    @property
    def shape_text(self) -> str:
        """`1536 × 2048`, or of experts `128 × (1536 × 2048)`."""
        sides = " × ".join(map(str, self.shape))
        return sides if self.experts is None else f"{self.experts} × ({sides})"

    @property
    def density(self) -> float:
        """|A| / n."""
        return self.active / self.weights

    @property
    def backward_density(self) -> float:
        """|B| / n."""
        return self.stored / self.weights

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "density": self.density, "backward_density": self.backward_density}


@dataclass
class CheckpointSummary:
    """
    A checkpoint as its headers describe it.

    Attributes:
        name (`str`): what was asked for.
        kind (`str`): `"sparse"`, `"compact"` or `"dense"`.
        layers (`list[LayerSummary]`): the sparse layers; of a dense checkpoint those whose zeros were counted.
        parameters (`int`): all numbers of the dense model, as far as the files hold them.
        files (`dict[str, int]`): bytes by file.
        settings (`dict`, *optional*): those of its training.
        step (`int`, *optional*): optimizer steps taken.
        format_version (`str`, *optional*): of the state file.
    """

    name: str
    kind: str
    layers: list[LayerSummary]
    parameters: int
    files: dict[str, int]
    settings: dict[str, Any] | None = None
    step: int | None = None
    format_version: str | None = None

    def totals(self) -> dict[str, Any]:
        """Sums over the layers, and their densities together; `None` without layers."""
        weights, active, stored = (
            sum(getattr(layer, key) for layer in self.layers) for key in ("weights", "active", "stored")
        )
        training = [layer.training_bytes for layer in self.layers]
        return {
            "weights": weights,
            "active": active,
            "stored": stored,
            "density": active / weights if weights else None,
            "backward_density": stored / weights if weights else None,
            "nonzero_parameters": self.parameters - weights + active,
            "parameters": self.parameters,
            "file_bytes": sum(self.files.values()),
            "training_bytes": None if None in training or not training else sum(training),
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "layers": [layer.to_dict() for layer in self.layers], "totals": self.totals()}


def summarize(checkpoint: Checkpoint, count_zeros: bool = False) -> CheckpointSummary:
    """
    Describes a checkpoint by its headers.

    Args:
        checkpoint ([`Checkpoint`]): its files.
        count_zeros (`bool`, *optional*, defaults to `False`): reads the matrices of a dense checkpoint and counts.
    """
    held = sum(tensor.numel for _, tensor in checkpoint.tensors())
    headers = [*checkpoint.weights, *([checkpoint.state] if checkpoint.state else [])]
    files = {file.path.name: sum(tensor.nbytes for tensor in file.tensors.values()) for file in headers}
    if checkpoint.state is None:
        layers = list(_matrices(checkpoint)) if count_zeros else []
        return CheckpointSummary(checkpoint.name, "dense", layers, held, files)
    metadata = checkpoint.state.metadata
    compact = metadata.get("kind") == "compact"
    settings = json.loads(metadata["config"])
    experts = json.loads(metadata.get("experts", "{}"))
    layers = [
        _sparse_layer(checkpoint, name, shape, experts.get(name), settings, compact)
        for name, shape in json.loads(metadata["shapes"]).items()
    ]
    parameters = held + (sum(layer.weights for layer in layers) if compact else 0)
    kind = "compact" if compact else "sparse"
    version = metadata["format_version"]
    return CheckpointSummary(
        checkpoint.name, kind, layers, parameters, files, settings, int(metadata["step"]), version
    )


def _matrices(checkpoint: Checkpoint) -> Iterator[LayerSummary]:
    """The matrices of a dense checkpoint, with their weights that are not zero as A and B."""
    for file in checkpoint.weights:
        for name, tensor in file.tensors.items():
            if len(tensor.shape) > 1:
                nonzero = count_nonzero(file.numbers(name), tensor.dtype)
                counts = tensor.numel, nonzero, nonzero
                yield LayerSummary(name, list(tensor.shape), tensor.dtype, *counts, file_bytes=tensor.nbytes)


def _sparse_layer(
    checkpoint: Checkpoint,
    name: str,
    rows_and_columns: list[int],
    experts: int | None,
    settings: dict[str, Any],
    compact: bool,
) -> LayerSummary:
    rows, columns = rows_and_columns
    state = checkpoint.state
    own = {kind: state.tensors[f"{name}.{kind}"] for kind in KINDS if f"{name}.{kind}" in state.tensors}
    kept = own["values" if compact else "rest"]
    active, stored = _counts(state, name, compact)
    in_files = sum(tensor.nbytes for tensor in own.values())
    if not compact:
        in_files += _weight_bytes(checkpoint, name) or rows * columns * ITEM_BYTES[kept.dtype]
    shape, counts = [rows // (experts or 1), columns], (rows * columns, active, stored)
    layer = LayerSummary(name, shape, kept.dtype, *counts, file_bytes=in_files, experts=experts)
    if not compact:
        keeps_values = kept.numel == layer.weights - active
        norms = own["input_norms"].nbytes if "input_norms" in own else 0
        layer.training_bytes = norms + _training_bytes(layer, ITEM_BYTES[kept.dtype], keeps_values, settings)
    return layer


def _weight_bytes(checkpoint: Checkpoint, name: str) -> int | None:
    """What α takes; `None` where the files have it under another name or in pieces, as experts of many families."""
    for key in (f"{name}.weight", name):
        if file := checkpoint.find(key):
            return file.tensors[key].nbytes
    return None


def _counts(state: FileHeader, name: str, compact: bool) -> tuple[int, int]:
    """|A| and |B| of a layer: as noted in the header, or, in files of 0.1.0, by its bits."""
    if compact:
        return (state.tensors[f"{name}.values"].numel,) * 2
    if "counts" in state.metadata:
        active, stored = json.loads(state.metadata["counts"])[name]
        return active, stored
    return count_bits(state.numbers(f"{name}.active")), count_bits(state.numbers(f"{name}.backward"))


def _training_bytes(layer: LayerSummary, size: int, keeps_values: bool, settings: dict[str, Any]) -> int:
    """What a layer takes in training with Adam, as `sparsity_report` counts it, with a reservoir in memory."""
    height, width = settings.get("block_size") or (1, 1)
    rows, columns = layer.shape[0] * (layer.experts or 1) // height, layer.shape[1] // width
    blocks = layer.stored // (height * width)
    copies = COPIES_IN_TRAINING + (settings.get("new_state") == "fresh")
    offsets = (2 * rows + 1) * (4 if blocks < 2**31 else 8)
    indices = blocks * (2 if columns <= 2**15 else 4)
    walk = 4 * (columns + 1 + 2 * blocks) if height % 16 == width % 16 == 0 else 0
    tracking = -(-layer.weights // 8) + 8
    reservoir = size * (layer.weights - layer.stored) if keeps_values and settings["reservoir_device"] != "disk" else 0
    return layer.stored * size * copies + offsets + indices + walk + tracking + reservoir
