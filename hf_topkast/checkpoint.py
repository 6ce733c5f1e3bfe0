"""Files on disk: α under the stock names for every reader, and beside it what only training needs."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .base_layer import STRUCTURE, TRACKING, TopKastLayer
from .config import TopKastConfig
from .ops.reference import expand_active
from .pattern import Pattern, pack_bits, unpack_bits
from .reservoir import assemble_theta
from .surgery import sparse_info, sparse_layers


STATE_NAME = "topkast_state.safetensors"
FORMAT_VERSION = 1
LAYER_TENSORS = ("values", "reservoir", *STRUCTURE, *TRACKING)


class CheckpointError(ValueError):
    """A sparse checkpoint that cannot be loaded exactly: missing, damaged, or of another model or version."""


@dataclass
class SparseState:
    """
    What `topkast_state.safetensors` holds.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): per layer name, `.active` and `.backward` (both sets as packed bits),
            `.rest` (θ outside A, by ascending flat index of the (out, in) weight), `.unvisited` and
            `.initial_reservoir_size`.
        config ([`TopKastConfig`]): the configuration of the run.
        shapes (`dict[str, tuple[int, int]]`): (out, in) of each layer.
        digests (`dict[str, str]`): of each layer's weights on A, which `model.safetensors` holds.
        step (`int`): optimizer steps taken.
    """

    tensors: dict[str, Tensor]
    config: TopKastConfig
    shapes: dict[str, tuple[int, int]]
    digests: dict[str, str]
    step: int

    def masks(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a layer as bool masks of shape (out, in)."""
        out_features, in_features = self.shapes[name]
        active, backward = (
            unpack_bits(self.tensors[f"{name}.{key}"], out_features * in_features).view(out_features, in_features)
            for key in ("active", "backward")
        )
        return active, backward


def split_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], SparseState]:
    """
    Splits a sparse model's state dict into what stock readers know and what only training needs.

    Args:
        model (`torch.nn.Module`): the sparse model; says which keys belong to sparse layers.
        state_dict (`dict[str, torch.Tensor]`): its state dict, or one gathered for it.

    Returns:
        `tuple`: the state dict of the dense model, with α as the projections' weights, and the [`SparseState`].
    """
    stock = dict(state_dict)
    tensors: dict[str, Tensor] = {}
    shapes, digests = {}, {}
    for name, layer in sparse_layers(model):
        own = {key: stock.pop(f"{name}.{key}").cpu() for key in LAYER_TENSORS}
        pattern = Pattern(*(own[key] for key in STRUCTURE), layer.pattern.shape, layer.block_size)
        active = pattern.active_mask()
        alpha = expand_active(own["values"], pattern)
        stock[f"{name}.weight"] = layer.to_stock(alpha)
        tensors[f"{name}.active"] = pack_bits(active)
        tensors[f"{name}.backward"] = pack_bits(pattern.backward_mask())
        tensors[f"{name}.rest"] = assemble_theta(own["values"], pattern, own["reservoir"])[~active]
        tensors.update({f"{name}.{key}": own[key] for key in TRACKING})
        shapes[name], digests[name] = pattern.shape, _digest({"weight": alpha[active]})
    info = sparse_info(model)
    return stock, SparseState(tensors, info.config, shapes, digests, info.step)


def write_state(state: SparseState, directory: str | os.PathLike):
    """Writes `topkast_state.safetensors` into a directory."""
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(state.config.to_dict()),
        "shapes": json.dumps(state.shapes),
        "digests": json.dumps(state.digests),
        "step": str(state.step),
    }
    metadata["digest"] = _digest(state.tensors, metadata)
    save_file({key: tensor.contiguous() for key, tensor in state.tensors.items()}, _path(directory), metadata)


def read_state(directory: str | os.PathLike) -> SparseState:
    """
    Reads and checks `topkast_state.safetensors`.

    Raises:
        CheckpointError: if it is missing, truncated or changed, or written by another version of the format.
    """
    path = _path(directory)
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
            if version != str(FORMAT_VERSION):
                raise CheckpointError(
                    f"{path} has format version {version!r}, and this version of hf_topkast reads {FORMAT_VERSION}. "
                    "Install the version that wrote it."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file, not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}). Use another checkpoint.") from error
    if metadata.get("digest") != _digest(tensors, metadata):
        raise CheckpointError(
            f"{path} is damaged: its content does not match the digest it was written with. Use another checkpoint."
        )
    return SparseState(
        tensors=tensors,
        config=TopKastConfig.from_dict(json.loads(metadata["config"])),
        shapes={name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()},
        digests=json.loads(metadata["digests"]),
        step=int(metadata["step"]),
    )


def restore_theta(alpha: Tensor, state: SparseState, name: str) -> Tensor:
    """
    θ of one layer from α, as `model.safetensors` holds it, and the state.

    Args:
        alpha (`torch.Tensor`): (out, in).
        state ([`SparseState`]): the state saved with it.
        name (`str`): the layer.

    Returns:
        `torch.Tensor`: (out, in), in the dtype and on the device of `alpha`.

    Raises:
        CheckpointError: if the weights were not saved together with this state.
    """
    if state.shapes.get(name) != tuple(alpha.shape):
        raise CheckpointError(
            f"{STATE_NAME} belongs to another model: layer '{name}' has shape {tuple(alpha.shape)} (out, in) in the "
            f"model and {state.shapes.get(name, 'no entry')} in the state."
        )
    active = state.masks(name)[0].to(alpha.device)
    rest = state.tensors[f"{name}.rest"]
    same_dtype = alpha.dtype == rest.dtype  # from_pretrained(dtype=...) has rounded them otherwise
    if bool(alpha[~active].any()) or (same_dtype and _digest({"weight": alpha[active]}) != state.digests[name]):
        raise CheckpointError(
            f"{STATE_NAME} was not saved together with these weights: those of layer '{name}' are not the ones it was "
            "written with. Keep the two files of one checkpoint together."
        )
    return alpha.masked_scatter(~active, rest.to(alpha))


def load_checkpoint(model: nn.Module, directory: str | os.PathLike) -> SparseState:
    """
    Loads a directory written by `save_pretrained` into a sparse model of the same shapes, bit by bit.

    Args:
        model (`torch.nn.Module`): a sparse model.
        directory (`str` or `os.PathLike`): a checkpoint directory.

    Returns:
        [`SparseState`]: what the state file held.

    Raises:
        CheckpointError: if the state file is missing, damaged, or of another model or version. The model is unchanged
            then.
    """
    if not Path(directory).is_dir():
        raise CheckpointError(f"There is no checkpoint directory '{directory}'.")
    state = read_state(directory)
    layers = dict(sparse_layers(model))
    if set(layers) != set(state.shapes):
        odd = sorted(set(layers) ^ set(state.shapes))[0]
        place = "the model" if odd in layers else "the checkpoint"
        raise CheckpointError(
            f"{_path(directory)} belongs to another model: layer '{odd}' is sparse only in {place}. Sparsify the "
            "model with the target_modules of the checkpoint, or load it with from_pretrained."
        )
    weights = _read_weights(Path(directory))
    _check_weights(model, weights, directory)
    for name, layer in layers.items():  # all before the first change, so that an error leaves the model as it was
        restore_theta(layer.to_rows(weights[f"{name}.weight"]), state, name)
    for name, layer in layers.items():
        restore_layer(layer, restore_theta(layer.to_rows(weights.pop(f"{name}.weight")), state, name), state, name)
    model.load_state_dict(weights, strict=False)
    sparse_info(model).step = state.step
    return state


def _check_weights(model: nn.Module, weights: dict[str, Tensor], directory: str | os.PathLike):
    """Whether a checkpoint has the weights of a model, names and shapes; of tied ones it holds only one."""
    own = model.state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    for name, layer in sparse_layers(model):
        for key in LAYER_TENSORS:
            shapes.pop(f"{name}.{key}")
        shapes[f"{name}.weight"] = layer.pattern.shape[::-1] if layer.stores_transposed else layer.pattern.shape
    unknown = [key for key in weights if key not in shapes]
    held = {own[key].data_ptr() for key in weights if key in own}
    for key, shape in shapes.items():
        found = tuple(weights[key].shape) if key in weights else None
        tied = found is None and key in own and own[key].data_ptr() in held
        if unknown or (found != shape and not tied):
            raise CheckpointError(
                f"{directory} belongs to another model: "
                + (
                    f"it has '{unknown[0]}'."
                    if unknown
                    else f"'{key}' is {found or 'missing'} there and {shape} here."
                )
            )


def restore_layer(layer: TopKastLayer, theta: Tensor, state: SparseState, name: str):
    """Gives a sparse layer the weights and the sets of a checkpoint; `theta` is (out, in)."""
    device = layer.values.device
    active, backward = (mask.to(device) for mask in state.masks(name))
    layer.reassign(active, backward, theta.to(device, layer.values.dtype))
    layer.unvisited.copy_(state.tensors[f"{name}.unvisited"])
    layer.initial_reservoir_size.copy_(state.tensors[f"{name}.initial_reservoir_size"])


def _read_weights(directory: Path) -> dict[str, Tensor]:
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    names = [SAFE_WEIGHTS_NAME]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights.update(load_file(directory / name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{directory / name} is missing or damaged ({error}).") from error
    return weights


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    metadata = metadata or {}
    for key in sorted(metadata.keys() - {"digest"}):
        digest.update(f"{key}={metadata[key]};".encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _path(directory: str | os.PathLike) -> Path:
    return Path(directory) / STATE_NAME
