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

from .config import TopKastConfig
from .layers import STRUCTURE, TRACKING, TopKastLayer
from .ops.reference import expand_active
from .pattern import Pattern, pack_bits, unpack_bits
from .reservoir import assemble_theta
from .surgery import sparse_layers, sparse_root


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
        step (`int`): optimizer steps taken.
    """

    tensors: dict[str, Tensor]
    config: TopKastConfig
    shapes: dict[str, tuple[int, int]]
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
    shapes = {}
    for name, layer in sparse_layers(model):
        own = {key: stock.pop(f"{name}.{key}").cpu() for key in LAYER_TENSORS}
        pattern = Pattern(*(own[key] for key in STRUCTURE), layer.pattern.in_features)
        active = pattern.active_mask()
        stock[f"{name}.weight"] = layer.to_stock(expand_active(own["values"], pattern))
        tensors[f"{name}.active"] = pack_bits(active)
        tensors[f"{name}.backward"] = pack_bits(pattern.backward_mask())
        tensors[f"{name}.rest"] = assemble_theta(own["values"], pattern, own["reservoir"])[~active]
        tensors.update({f"{name}.{key}": own[key] for key in TRACKING})
        shapes[name] = pattern.shape
    root = sparse_root(model)
    return stock, SparseState(tensors, root.topkast_config, shapes, root.topkast_step)


def write_state(state: SparseState, directory: str | os.PathLike):
    """Writes `topkast_state.safetensors` into a directory."""
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(state.config.to_dict()),
        "shapes": json.dumps(state.shapes),
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
    inactive = ~state.masks(name)[0].to(alpha.device)
    if bool(alpha[inactive].any()):
        raise CheckpointError(
            f"{STATE_NAME} was not saved together with these weights: layer '{name}' has non-zero weights outside the "
            "state's active set. Keep the two files of one checkpoint together."
        )
    return alpha.masked_scatter(inactive, state.tensors[f"{name}.rest"].to(alpha))


def load_checkpoint(model: nn.Module, directory: str | os.PathLike) -> SparseState:
    """
    Loads a directory written by `save_pretrained` into a sparse model of the same shapes, bit by bit.

    Args:
        model (`torch.nn.Module`): a sparse model.
        directory (`str` or `os.PathLike`): a checkpoint directory.

    Returns:
        [`SparseState`]: what the state file held.

    Raises:
        CheckpointError: if the state file is missing, damaged, or of another model or version.
    """
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
    alphas = {name: layer.to_rows(weights.pop(f"{name}.weight")) for name, layer in layers.items()}
    thetas = {name: restore_theta(alpha, state, name) for name, alpha in alphas.items()}
    for name, layer in layers.items():
        restore_layer(layer, thetas[name], state, name)
    _load_rest(model, weights, directory)
    model.topkast_step = state.step
    return state


def restore_layer(layer: TopKastLayer, theta: Tensor, state: SparseState, name: str):
    """Gives a sparse layer the weights and the sets of a checkpoint; `theta` is (out, in)."""
    device = layer.values.device
    active, backward = (mask.to(device) for mask in state.masks(name))
    layer.reassign(active, backward, theta.to(device, layer.values.dtype))
    layer.unvisited.copy_(state.tensors[f"{name}.unvisited"])
    layer.initial_reservoir_size.copy_(state.tensors[f"{name}.initial_reservoir_size"])


def _load_rest(model: nn.Module, weights: dict[str, Tensor], directory: str | os.PathLike):
    """Loads the dense parameters; of tied ones a checkpoint holds only one."""
    result = model.load_state_dict(weights, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameters[key]) for key in weights if key in parameters}
    loaded |= {id(layer.values) for _, layer in sparse_layers(model)}
    lost = [key for key in result.missing_keys if key in parameters and id(parameters[key]) not in loaded]
    if lost or result.unexpected_keys:
        raise CheckpointError(
            f"{directory} belongs to another model: missing {lost[:3]}, unexpected {result.unexpected_keys[:3]}."
        )


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


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(metadata.keys() - {"digest"}):
        digest.update(f"{key}={metadata[key]};".encode())
    for key in sorted(tensors):
        tensor = tensors[key].contiguous()
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _path(directory: str | os.PathLike) -> Path:
    return Path(directory) / STATE_NAME
