"""What is sparse in a model, and what that saves in training, counted layer by layer."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..layers import TopKastGroupedLinear, TopKastLayer
from ..method import get_method
from ..storage import STRUCTURE, TRACKING
from .info import sparse_layers


# A parameter that is trained with Adam exists four times: itself, its gradient and two moments.
COPIES_IN_TRAINING = 4


@dataclass
class LayerRow:
    """
    One sparse layer: its name, type, (out, in) shape, sizes and densities of A and B, and bytes in training; of
    experts the shape of one, and how many there are.
    """

    name: str
    type: str
    shape: tuple[int, int]
    weights: int
    active: int
    stored: int
    density: float
    backward_density: float
    trainable_state_bytes: int
    dense_state_bytes: int
    experts: int | None = None

    @property
    def shape_text(self) -> str:
        """`1536 × 2048`, or of experts `128 × (1536 × 2048)`."""
        sides = f"{self.shape[0]} × {self.shape[1]}"
        return sides if self.experts is None else f"{self.experts} × ({sides})"


@dataclass
class SparsityCounts:
    """
    Densities and bytes of a model, per sparse layer and in total.

    Attributes:
        rows (`list[LayerRow]`): one per sparse layer.
        density (`float`): Σ|A| / Σn over the sparse layers.
        backward_density (`float`): Σ|B| / Σn over the sparse layers.
        dense_parameters (`int`): parameters outside the sparse layers' weights: embeddings, head, norms, biases.
        trainable_state_bytes (`int`): the whole model in training with Adam: parameters, gradients and both moments
            of what is trainable, and indices and reservoir of the sparse layers (but not a reservoir on disk).
        dense_state_bytes (`int`): the same for the dense model.
        needs (`dict[str, str]`): what the method, by its name, needs in training beyond that.
    """

    rows: list[LayerRow]
    density: float
    backward_density: float
    dense_parameters: int
    trainable_state_bytes: int
    dense_state_bytes: int
    needs: dict[str, str] = field(default_factory=dict)

    @property
    def nonzero_parameters(self) -> int:
        """Parameters that the forward pass uses: those of A and all dense ones."""
        return sum(row.active for row in self.rows) + self.dense_parameters

    @property
    def total_parameters(self) -> int:
        """Parameters of the dense model."""
        return sum(row.weights for row in self.rows) + self.dense_parameters

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        extra = {"nonzero_parameters": self.nonzero_parameters, "total_parameters": self.total_parameters}
        return {**asdict(self), **extra}

    def to_markdown(self) -> str:
        """The densities as a Markdown table, for a model card."""
        lines = ["| layer | out × in | density | backward density |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{row.name}` | {row.shape_text} | {row.density:.4f} | {row.backward_density:.4f} |"
            for row in self.rows
        ]
        lines.append(f"| all sparse layers | | {self.density:.4f} | {self.backward_density:.4f} |")
        return "\n".join(lines)


def count_sparsity(model: nn.Module) -> SparsityCounts:
    """Counts a model's sparse and dense weights, and the bytes of its training state."""
    layers = list(sparse_layers(model))
    configs = {id(info): info.config for module in model.modules() if (info := module.__dict__.get("topkast"))}
    counts_steps = any(config.new_state == "fresh" for config in configs.values())
    rows = [_row(name, layer, COPIES_IN_TRAINING + counts_steps) for name, layer in layers]
    values = {id(layer.values) for _, layer in layers}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in values]
    rest_bytes = sum(p.numel() * p.element_size() * (COPIES_IN_TRAINING if p.requires_grad else 1) for p in rest)
    weights = sum(row.weights for row in rows) or 1
    return SparsityCounts(
        rows=rows,
        density=sum(row.active for row in rows) / weights if rows else 1.0,
        backward_density=sum(row.stored for row in rows) / weights if rows else 1.0,
        dense_parameters=sum(parameter.numel() for parameter in rest),
        trainable_state_bytes=sum(row.trainable_state_bytes for row in rows) + rest_bytes,
        dense_state_bytes=sum(row.dense_state_bytes for row in rows) + rest_bytes,
        needs={config.method: get_method(config.method).needs for config in configs.values()},
    )


def _row(name: str, layer: TopKastLayer, copies: int) -> LayerRow:
    copies, dense_copies = (copies, COPIES_IN_TRAINING) if layer.values.requires_grad else (1, 1)
    buffers = [getattr(layer, buffer) for buffer in (*STRUCTURE, *TRACKING)]
    if layer.input_norms is not None:
        buffers.append(layer.input_norms)
    if layer.column_walk is not None:
        buffers.append(layer.column_walk)
    if layer.reservoir_device != "disk":
        buffers.append(layer.reservoir)
    experts = layer.experts if isinstance(layer, TopKastGroupedLinear) else None
    return LayerRow(
        name=name,
        type=type(layer).__name__,
        shape=layer.matrix_shape if experts is None else (layer.out_features, layer.in_features),
        weights=layer.numel,
        active=layer.active_count,
        stored=layer.values.numel(),
        density=layer.density,
        backward_density=layer.backward_density,
        trainable_state_bytes=layer.values.nbytes * copies + sum(buffer.nbytes for buffer in buffers),
        dense_state_bytes=layer.numel * layer.values.element_size() * dense_copies,
        experts=experts,
    )
