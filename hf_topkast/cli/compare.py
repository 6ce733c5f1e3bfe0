"""`hf-topkast compare`: how far apart the sets and the weights of two checkpoints are, from their files."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer

from ..block_order import inverse, row_stride
from ..headers import FileHeader, as_floats, unpack_bits
from .checkpoint import Checkpoint, open_checkpoint
from .output import AsJson, print_json, print_lines, print_table, share, waiting


@dataclass
class Layer:
    """
    What two checkpoints hold of one layer.

    Attributes:
        name (`str`): of both.
        densities (`tuple[float, float]`): |A| / n.
        both, either (`int`): sizes of the intersection and of the union of the two sets A.
        overlap (`float`): Jaccard's: `both / either`.
        difference (`float`, *optional*): ‖α₁ − α₂‖ / ‖α₁‖, with zeros outside A; `None` where the files give the
            weights other names than the model.
    """

    name: str
    densities: tuple[float, float]
    both: int
    either: int
    overlap: float
    difference: float | None


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint, sparse, compact or dense.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one of the same model.")],
    as_json: AsJson = False,
):
    """
    Compare the active sets and weights of two checkpoints, layer by layer, from their files.

    The overlap is |A₁ ∩ A₂| / |A₁ ∪ A₂|; the difference is the norm of that of the active weights, over the norm of
    the first one's. Of a dense checkpoint, what is not zero counts as active.

    Examples:

        hf-topkast compare runs/demo/checkpoint-500 runs/demo

        hf-topkast compare runs/seed-0 runs/seed-1 --json
    """
    one, two = open_checkpoint(first), open_checkpoint(second)
    with waiting("Reading"):
        layers = list(compare_checkpoints(one, two))
    both, either = (sum(getattr(layer, key) for layer in layers) for key in ("both", "either"))
    if as_json:
        print_json({"first": first, "second": second, "overlap": both / either, "layers": list(map(asdict, layers))})
        return
    rows = (
        (layer.name, *map(share, layer.densities), share(layer.overlap), share(layer.difference)) for layer in layers
    )
    titles = ("layer", ">density of A", ">density of B", ">overlap", ">difference")
    print_table(titles, rows, [("all of them", "", "", share(both / either), "")])
    print_lines("overlap: of the two active sets, |A₁ ∩ A₂| / |A₁ ∪ A₂|. difference: ‖α₁ − α₂‖ / ‖α₁‖.")


def compare_checkpoints(one: Checkpoint, two: Checkpoint) -> Iterator[Layer]:
    """
    Compares the layers that are sparse in at least one of two checkpoints, one after the other.

    Raises:
        ValueError: if there are none, if one is missing in a checkpoint, or its shapes differ.
    """
    shapes = [_shapes(each) for each in (one, two)]
    if not any(shapes):
        raise ValueError(f"Neither {one.name} nor {two.name} is sparse: there are no sets to compare.")
    for name in shapes[0] | shapes[1]:
        held = [each[name] for each in shapes if name in each]
        if held[0] != held[-1]:
            raise ValueError(
                f"Layer '{name}' is {held[0]} in {one.name} and {held[1]} in {two.name}: compare two of one model."
            )
        masks = [_mask(each, name, held[0]) for each in (one, two)]
        known = next(mask for mask in masks if mask is not None)
        weights = [_weight(each, name, known if mask is None else mask) for each, mask in zip((one, two), masks)]
        masks = [weight != 0 if mask is None else mask for weight, mask in zip(weights, masks)]
        yield _compare(name, masks, weights)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    if checkpoint.state is None:
        return {}
    return {name: tuple(shape) for name, shape in json.loads(checkpoint.state.metadata["shapes"]).items()}


def _mask(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """A of a layer, bool, (out, in); `None` where the layer is dense."""
    if checkpoint.state is None or f"{name}.active" not in checkpoint.state.tensors:
        return None
    return _from_grid(checkpoint.state, name, _mask_of_grid(checkpoint.state, name, shape))


def _mask_of_grid(state: FileHeader, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return unpack_bits(state.numbers(f"{name}.active"), math.prod(shape)).reshape(shape)


def _from_grid(state: FileHeader, name: str, grid: np.ndarray) -> np.ndarray:
    """What a state file has in the order of its grid of blocks, (out, in), in the order of the outputs."""
    config, experts = (json.loads(state.metadata.get(key, "{}")) for key in ("config", "experts"))
    matrices = experts.get(name, 1)
    count = len(grid) // matrices
    stride = row_stride(count, config["block_size"][0], True) if config.get("scatter_blocks") else 1
    places = np.arange(count) * inverse(stride, count) % count
    return grid.reshape(matrices, count, -1)[:, places].reshape(grid.shape)


def _weight(checkpoint: Checkpoint, name: str, mask: np.ndarray) -> np.ndarray | None:
    """
    The weight of a layer, (out, in), for a set A that is its own or another checkpoint's; `None` where the layer is
    sparse and the files give its weight another name.
    """
    state = checkpoint.state
    if state is not None and f"{name}.values" in state.tensors:  # a compact export
        alpha = np.zeros(mask.shape, np.float32)
        values = as_floats(state.numbers(f"{name}.values"), state.tensors[f"{name}.values"].dtype)
        alpha[_mask_of_grid(state, name, mask.shape)] = values
        return _from_grid(state, name, alpha)
    file = checkpoint.find(f"{name}.weight")
    if file is None and not (state is not None and f"{name}.active" in state.tensors):
        raise ValueError(
            f"{checkpoint.name} has no '{name}.weight': compare two checkpoints of one model, both of them sparse "
            "where files give layers other names than the model does, as they do experts."
        )
    if file is None:
        return None
    found = file.tensors[f"{name}.weight"]
    weight = as_floats(file.numbers(f"{name}.weight"), found.dtype)
    fitting = [each for each in (weight, weight.T) if each.shape == mask.shape]
    if not fitting:
        raise ValueError(f"'{name}.weight' of {checkpoint.name} is {found.shape}, and the sets are of {mask.shape}.")
    # GPT-2 stores its weights as (in, out). Of a square one the way that puts more of it on A is the right one.
    return max(fitting, key=lambda each: float(np.abs(each[mask]).sum()))


def _compare(name: str, masks: list[np.ndarray], weights: list[np.ndarray | None]) -> Layer:
    both, either = int((masks[0] & masks[1]).sum()), int((masks[0] | masks[1]).sum())
    densities = float(masks[0].mean()), float(masks[1].mean())
    difference = None
    if weights[0] is not None and weights[1] is not None:
        norm, apart = _norm(weights[0]), _norm(weights[1] - weights[0])
        difference = apart / norm if norm else None
    return Layer(name, densities, both, either, both / either if either else 1.0, difference)


def _norm(numbers: np.ndarray) -> float:
    return math.sqrt(float(np.square(numbers, dtype=np.float64).sum()))
