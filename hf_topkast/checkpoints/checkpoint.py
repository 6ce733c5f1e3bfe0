"""What goes into the files of a checkpoint and comes out of them: α under the stock names, and the state beside it."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..block_order import row_stride
from ..layers import TopKastGroupedLinear, TopKastLayer
from ..method import get_method
from ..ops.reference import expand_active
from ..storage import (
    NOWHERE,
    STRUCTURE,
    TRACKING,
    Pattern,
    assemble_theta,
    is_sharded,
    local,
    mixture,
    pack_bits,
    part_of,
    shard_like,
)
from ..surgery import check_here, sparse_info, sparse_layers
from .names_on_disk import to_model_names
from .state_file import (
    STATE_NAME,
    CheckpointError,
    SparseState,
    fit_digests,
    read_state,
    rest_mask,
    weight_digests,
)


LAYER_TENSORS = ("values", "reservoir", *STRUCTURE, *TRACKING)
OPTIONAL_TENSORS = ("input_norms", "sets_digest")


def split_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], SparseState]:
    """
    Splits a sparse model's state dict into what stock readers know and what only training needs.

    Args:
        model (`torch.nn.Module`): the sparse model; says which keys belong to sparse layers.
        state_dict (`dict[str, torch.Tensor]`, *optional*): its state dict, or one gathered for it.

    Returns:
        `tuple`: the state dict of the dense model, with α as the projections' weights, and the [`SparseState`].

    Raises:
        CheckpointError: if a thread gave a layer other sets meanwhile; the message names the layer.
        ValueError: if a layer's numbers are offloaded.
    """
    info = sparse_info(model)
    places = _places(model)
    begun = {name: layer.assignments for name, layer in sparse_layers(model)}
    stock = dict(model.state_dict() if state_dict is None else state_dict)
    tensors: dict[str, Tensor] = {}
    shapes, digests = {}, {}
    for name, layer in sparse_layers(model):
        layer.check_sets()
        missing = [key for key in LAYER_TENSORS if f"{name}.{key}" not in stock]
        if missing:
            raise CheckpointError(
                f"The state dict to be saved lacks '{name}.{missing[0]}', without which the sparse layer's weights "
                "have no places. Take model.state_dict()."
            )
        keys = [key for key in (*LAYER_TENSORS, *OPTIONAL_TENSORS) if f"{name}.{key}" in stock]
        check_here(name, (stock[f"{name}.{key}"] for key in keys))
        own = {key: stock.pop(f"{name}.{key}").cpu().clone() for key in keys}
        if begun[name] % 2 or layer.assignments != begun[name]:
            raise CheckpointError(
                f"Layer '{name}' got other sets while it was being saved: a refresh in another thread, or one that "
                "has failed. Nothing is written. Save between two optimizer steps, or try again."
            )
        structure = (own[key] for key in STRUCTURE)
        problem = mixture(*structure, own.get("sets_digest"), layer.matrix_shape, layer.block_size, layer.row_stride)
        if problem:
            raise CheckpointError(f"Layer '{name}': {problem}")
        pattern = Pattern(*(own[key] for key in STRUCTURE), layer.matrix_shape, layer.block_size)
        active = pattern.active_mask()
        alpha = expand_active(own["values"], pattern)
        weight = layer.from_grid(alpha)
        for place in places[layer]:  # a layer that stands in several, as the dense one it replaced did
            stock[layer.stock_name(place)] = weight
            for key in (*LAYER_TENSORS, *OPTIONAL_TENSORS):
                stock.pop(f"{place}.{key}", None)
        tensors[f"{name}.active"] = pack_bits(active)
        backward = pattern.backward_mask()
        tensors[f"{name}.backward"] = pack_bits(backward)
        theta = assemble_theta(own["values"], pattern, own["reservoir"])
        tensors[f"{name}.rest"] = theta[rest_mask(active, backward, info.config)]
        tensors.update({f"{name}.{key}": own[key] for key in (*TRACKING, "input_norms") if key in own})
        if ("input_norms" in own) != (info.config.score == "activation"):
            raise CheckpointError(
                f"Layer '{name}' {'has' if 'input_norms' in own else 'lacks'} norms of its inputs, which does not go "
                f"with score={info.config.score!r}. Nothing is written: sparsify the model anew with calibration."
            )
        shapes[name], digests[name] = pattern.shape, weight_digests(alpha[active])
    experts = {name: layer.experts for name, layer in sparse_layers(model) if isinstance(layer, TopKastGroupedLinear)}
    return stock, SparseState(tensors, info.config, shapes, digests, info.step, experts=experts)


def _places(model: nn.Module) -> dict[TopKastLayer, list[str]]:
    """All names of every sparse layer."""
    places: dict[TopKastLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TopKastLayer):
            places.setdefault(module, []).append(name)
    return places


def restore_theta(alpha: Tensor, state: SparseState, name: str, exact: bool = False) -> Tensor:
    """
    θ of one layer from α, as `model.safetensors` holds it, and the state.

    Args:
        alpha (`torch.Tensor`): (out, in).
        state ([`SparseState`]): the state saved with it.
        name (`str`): the layer.
        exact (`bool`, *optional*, defaults to `False`): refuses α in another dtype than it was saved in, in place of
            rounding the rest alike.

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
    mixed = exact and alpha.dtype != rest.dtype
    if mixed or not fit_digests(alpha[active], state.digests[name], rest.dtype) or bool(alpha[~active].any()):
        raise CheckpointError(
            f"{STATE_NAME} was not saved together with these weights: those of layer '{name}' are not the ones it was "
            "written with. Keep the two files of one checkpoint together."
        )
    return alpha.masked_scatter(state.rest_mask(name).to(alpha.device), rest.to(alpha))


def load_checkpoint(model: nn.Module, directory: str | os.PathLike) -> SparseState:
    """
    Loads a directory written by `save_pretrained` into a sparse model of the same shapes, bit by bit unless
    the model is of a dtype that rounds them.

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
    if state.compact:
        raise CheckpointError(
            f"{directory} is a compact export, without the weights outside A: load it with from_pretrained, and start "
            "a new training from it."
        )
    layers = dict(sparse_layers(model))
    if set(layers) != set(state.shapes):
        odd = sorted(set(layers) ^ set(state.shapes))[0]
        place = "the model" if odd in layers else "the checkpoint"
        raise CheckpointError(
            f"{Path(directory) / STATE_NAME} belongs to another model: layer '{odd}' is sparse only in {place}. "
            "Sparsify the model with the target_modules of the checkpoint, or load it with from_pretrained."
        )
    for name, layer in layers.items():
        if list(layer.block_size) != state.config.block_size:
            raise CheckpointError(
                f"{directory} has sets of {state.config.block_size} blocks, and layer '{name}' of the model has "
                f"{list(layer.block_size)}. Sparsify the model with the block_size of the checkpoint."
            )
        rows = layer.matrix_shape[0] // layer.matrices
        stride = row_stride(rows, layer.block_size[0], state.config.scatter_blocks)
        for setting, mine, theirs in (
            ("scatter_blocks", layer.row_stride, stride),
            ("score", layer.input_norms is not None, state.config.score == "activation"),
            ("method", layer.reservoir_device != NOWHERE, get_method(state.config.method).keeps_values),
        ):
            if mine != theirs:
                raise CheckpointError(
                    f"{directory} was trained with {setting}={getattr(state.config, setting)!r}, and layer '{name}' "
                    f"of the model was made with another {setting}, which stores other numbers. Sparsify the model "
                    "with that of the checkpoint, or load it with from_pretrained."
                )
    own = model.state_dict()
    dense = _dense_tensors(model, own)
    own = {key: tensor for key, tensor in own.items() if key in dense}  # all but what sparse layers hold
    weights = to_model_names(model, _read_weights(Path(directory)), dense, directory)
    for layer, places in _places(model).items():  # a layer that stands in several counts by its first name
        name, *others = map(layer.stock_name, places)
        for other in others:
            del dense[other]
            if other in weights:
                weights.setdefault(name, weights.pop(other))
    _check_weights(weights, own, dense, directory)
    for name, layer in layers.items():  # all before the first change, so that an error leaves the model as it was
        restore_theta(layer.to_grid(weights[layer.stock_name(name)]), state, name, exact=True)
    for name, layer in layers.items():
        alpha = layer.to_grid(weights.pop(layer.stock_name(name)))
        restore_layer(layer, restore_theta(alpha, state, name), state, name)
    weights = {key: shard_like(t, own[key]) if is_sharded(own[key]) else t for key, t in weights.items()}
    model.load_state_dict(weights, strict=False)
    sparse_info(model).step = state.step
    return state


def _dense_tensors(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that a sparse model has as a dense one, on the meta device."""
    dense = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in state_dict.items()}
    for layer, places in _places(model).items():
        for place in places:
            for key in (*LAYER_TENSORS, *OPTIONAL_TENSORS):
                dense.pop(f"{place}.{key}", None)
            dense[layer.stock_name(place)] = torch.empty(layer.stock_shape, dtype=layer.values.dtype, device="meta")
    return dense


def _check_weights(
    weights: dict[str, Tensor], own: dict[str, Tensor], dense: dict[str, Tensor], directory: str | os.PathLike
):
    """Whether a checkpoint has the weights of a model, names and shapes; of tied ones it holds only one."""
    unknown = [key for key in weights if key not in dense]
    held = {local(own[key]).data_ptr() for key in weights if key in own}
    for key, shape in ((key, tuple(tensor.shape)) for key, tensor in dense.items()):
        found = tuple(weights[key].shape) if key in weights else None
        tied = found is None and key in own and local(own[key]).data_ptr() in held
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
    local(layer.unvisited).copy_(part_of(state.tensors[f"{name}.unvisited"], layer.unvisited))
    layer.initial_reservoir_size.copy_(state.tensors[f"{name}.initial_reservoir_size"])
    if f"{name}.input_norms" in state.tensors:
        layer.input_norms = state.tensors[f"{name}.input_norms"].to(device)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`, or without it, as `from_pretrained` does, of the shards of an index."""
    names = [SAFE_WEIGHTS_NAME]
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file() and not (directory / SAFE_WEIGHTS_NAME).is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}). Use another checkpoint.") from error
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            weights.update(load_file(directory / name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{directory / name} is missing or damaged ({error}).") from error
    return weights
