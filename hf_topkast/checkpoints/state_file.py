"""`topkast_state.safetensors`: what only training needs, or a compact export; written and read back exactly."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import TopKastConfig
from ..headers import READABLE_VERSIONS, STATE_NAME
from ..method import get_method
from ..ops import select_backend
from ..storage import pack_bits, spread_blocks, unpack_bits
from .durable import replacing


FORMAT_VERSION = 2
# `from_pretrained(dtype=...)` rounds weights, so a digest of each is kept.
ROUNDED = (torch.bfloat16, torch.float16)
TRAINING_TENSORS = ("active", "backward", "rest", "unvisited", "initial_reservoir_size")
COMPACT_TENSORS = ("active", "values")


class CheckpointError(ValueError):
    """A sparse checkpoint that cannot be loaded exactly: missing, damaged, or of another model or version."""


@dataclass
class SparseState:
    """
    What `topkast_state.safetensors` holds.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): per layer name, `.active` and `.backward` (both sets as packed bits),
            `.rest` (θ outside A, by ascending flat index of the (out, in) weight; outside of B only where the method
            keeps values there), `.unvisited` and `.initial_reservoir_size`, and with `score="activation"`
            `.input_norms`, of experts (experts, in). In a compact export only `.active` and
            `.values` (α on A, in that order). Rows of scattered blocks are in the order of the grid, see [`to_grid`].
        config ([`TopKastConfig`]): the configuration of the run.
        shapes (`dict[str, tuple[int, int]]`): (out, in) of each layer, of experts (experts · out, in).
        digests (`dict[str, dict[str, str]]`): of each layer's weights on A, which `model.safetensors` holds, by the
            dtype that they are loaded in; empty in an export.
        step (`int`): optimizer steps taken.
        compact (`bool`): whether it is a compact export, which holds α in place of what training needs.
        experts (`dict[str, int]`): how many there are, of each layer of experts; empty in older files.
    """

    tensors: dict[str, Tensor]
    config: TopKastConfig
    shapes: dict[str, tuple[int, int]]
    digests: dict[str, dict[str, str]]
    step: int
    compact: bool = False
    experts: dict[str, int] = field(default_factory=dict)

    def masks(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a layer as bool masks of shape (out, in); an export has no B\\A."""
        active = self._mask(name, "active")
        return active, active if self.compact else self._mask(name, "backward")

    def rest_mask(self, name: str) -> Tensor:
        """Where the numbers of `.rest` stand: bool, (out, in)."""
        active, backward = self.masks(name)
        return rest_mask(active, backward, self.config)

    def _mask(self, name: str, key: str) -> Tensor:
        out_features, in_features = self.shapes[name]
        packed = self.tensors[f"{name}.{key}"]
        return unpack_bits(packed, out_features * in_features).view(out_features, in_features)


def rest_mask(active: Tensor, backward: Tensor, config: TopKastConfig) -> Tensor:
    """Which weights outside A are stored, for sets A and B: bool, of their shape."""
    return ~active if get_method(config.method).keeps_values else backward & ~active


def write_state(state: SparseState, directory: str | os.PathLike[str]) -> None:
    """Writes `topkast_state.safetensors` into a directory."""
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "kind": "compact" if state.compact else "training",
        "config": json.dumps(state.config.to_dict()),
        "shapes": json.dumps(state.shapes),
        "digests": json.dumps(state.digests),
        "step": str(state.step),
        # For readers of the header only: how many experts a layer has, and |A| and |B|. Files of 0.1.0 lack both.
        "experts": json.dumps(state.experts),
        "counts": json.dumps({name: [int(mask.sum()) for mask in state.masks(name)] for name in state.shapes}),
    }
    metadata["digest"] = digest(state.tensors, metadata)
    tensors = {key: tensor.contiguous() for key, tensor in state.tensors.items()}
    with replacing(Path(directory) / STATE_NAME) as path:
        save_file(tensors, path, metadata)


def read_state(directory: str | os.PathLike[str]) -> SparseState:
    """
    Reads and checks `topkast_state.safetensors`.

    Raises:
        CheckpointError: if it is missing, truncated or changed, or written by another version of the format.
    """
    path = Path(directory) / STATE_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: without it the sets A and B and the weights outside A are lost, so training cannot "
            "be resumed from this checkpoint. Resume from another one; to fine-tune from its active weights instead, "
            "load it with from_pretrained."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("format_version")
            if version not in READABLE_VERSIONS:
                raise CheckpointError(
                    f"{path} has format version {version!r}, and this version of hf_topkast reads "
                    f"{' and '.join(READABLE_VERSIONS)}. Install the version that wrote it."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}). Use another checkpoint.") from error
    if metadata.get("digest") != digest(tensors, metadata):
        raise CheckpointError(
            f"{path} is damaged: its content does not match the digest it was written with. Use another checkpoint."
        )
    try:
        state = _parse(tensors, metadata)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be used ({error}). Use another checkpoint.") from error
    for problem in _problems(state):
        raise CheckpointError(f"{path} contradicts itself: {problem}. Use another checkpoint.")
    return state


def _parse(tensors: dict[str, Tensor], metadata: dict[str, str]) -> SparseState:
    config = TopKastConfig.from_dict(json.loads(metadata["config"]))
    get_method(config.method)
    select_backend(config.backend)
    digests = dict(json.loads(metadata["digests"]))
    if metadata["format_version"] == "1":
        digests = {name: {dtype_name(tensors[f"{name}.rest"].dtype): found} for name, found in digests.items()}
    return SparseState(
        tensors=tensors,
        config=config,
        shapes={name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()},
        digests={name: dict(found) for name, found in digests.items()},
        step=int(metadata["step"]),
        compact=metadata.get("kind") == "compact",
        experts={name: int(count) for name, count in json.loads(metadata.get("experts", "{}")).items()},
    )


def _problems(state: SparseState) -> Iterator[str]:
    """What keeps a state from being loaded exactly as it is; nothing for one that [`write_state`] has written."""
    if state.step < 0:
        yield f"it is of step {state.step}"
    if set(state.digests) != (set() if state.compact else set(state.shapes)):
        yield "its digests are not those of its layers"
    norms = ("input_norms",) if state.config.score == "activation" else ()
    kinds = COMPACT_TENSORS if state.compact else (*TRAINING_TENSORS, *norms)
    if set(state.tensors) != {f"{name}.{kind}" for name in state.shapes for kind in kinds}:
        yield "its tensors are not those of its layers"
        return
    for name, shape in state.shapes.items():
        if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
            yield f"layer '{name}' has the shape {shape}"
            return
        tensors = {kind: state.tensors[f"{name}.{kind}"] for kind in kinds}
        if norms and not state.compact and not _are_norms(tensors["input_norms"], shape):
            yield f"layer '{name}': 'input_norms' is not {shape[1]} numbers, or so many of each expert"
        keeps_values = get_method(state.config.method).keeps_values
        problems = _layer_problems(tensors, shape[0] * shape[1], keeps_values)
        yield from (f"layer '{name}': {problem}" for problem in problems)
        block_size = state.config.block_size
        if any(size % block for size, block in zip(shape, block_size)) or not all(
            torch.equal(mask, spread_blocks(mask[:: block_size[0], :: block_size[1]], block_size))
            for mask in state.masks(name)
        ):
            yield f"layer '{name}': its sets do not consist of whole blocks of {block_size}"


def _are_norms(norms: Tensor, shape: tuple[int, int]) -> bool:
    of_experts = norms.ndim == 2 and len(norms) > 0 and shape[0] % len(norms) == 0
    return norms.shape[-1:] == shape[1:] and (norms.ndim == 1 or of_experts)


def _layer_problems(tensors: dict[str, Tensor], numel: int, keeps_values: bool) -> Iterator[str]:
    masks = {}
    for kind in tensors.keys() & {"active", "backward", "unvisited"}:
        packed = tensors[kind]
        if packed.dtype != torch.uint8 or packed.shape != (-(-numel // 8),):
            yield f"'{kind}' is not {numel} packed bits"
            return
        masks[kind] = unpack_bits(packed, numel)
        if not torch.equal(pack_bits(masks[kind]), packed):
            yield f"'{kind}' has bits past its end"
    active = masks["active"]
    if "values" in tensors:
        held, count = "values", int(active.sum())
    else:
        held, count = "rest", (numel if keeps_values else int(masks["backward"].sum())) - int(active.sum())
    numbers = tensors[held]
    if not numbers.is_floating_point() or numbers.shape != (count,):
        yield f"'{held}' is {numbers.dtype} {tuple(numbers.shape)} and not {count} floating-point numbers"
    if held == "values":
        return
    if bool((active & ~masks["backward"]).any()):
        yield "A is not inside B"
    if bool((active & masks["unvisited"]).any()):
        yield "weights of A count as never visited"
    size = tensors["initial_reservoir_size"]
    if size.dtype != torch.int64 or size.ndim or not int(masks["unvisited"].sum()) <= int(size) <= numel:
        yield "'initial_reservoir_size' is not the size of a reservoir"


def digest(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """A digest of names, types, shapes and contents, and of metadata but its own entry `digest`."""
    total = hashlib.blake2b(digest_size=16)
    metadata = metadata or {}
    for key in sorted(metadata.keys() - {"digest"}):
        total.update(f"{key}={metadata[key]};".encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        total.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        total.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def weight_digests(weights: Tensor) -> dict[str, str]:
    """The digest of a layer's weights on A, (|A|,), in their own dtype and in each that they may be rounded to."""
    return {dtype_name(dtype): digest({"weight": weights.to(dtype)}) for dtype in (weights.dtype, *ROUNDED)}


def fit_digests(weights: Tensor, digests: dict[str, str], saved: torch.dtype) -> bool:
    """
    Whether loaded weights on A, (|A|,), are those that were saved, or these rounded to the dtype they have now. Of a
    dtype without a digest they are taken to be, if they were not saved in it.

    Args:
        weights (`torch.Tensor`): (|A|,), as loaded.
        digests (`dict[str, str]`): as [`weight_digests`] gives them.
        saved (`torch.dtype`): the dtype that they were saved in.
    """
    widened = weights.dtype != saved and torch.promote_types(weights.dtype, saved) == weights.dtype
    if widened:  # no number was rounded: back to what was saved
        loaded, weights = weights, weights.to(saved)
        if not torch.equal(weights.to(loaded.dtype), loaded):
            return False
    expected = digests.get(dtype_name(weights.dtype))
    return digest({"weight": weights}) == expected if expected is not None else weights.dtype != saved


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` and the like."""
    return str(dtype).removeprefix("torch.")
