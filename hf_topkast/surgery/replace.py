"""The swap of dense layers for sparse ones, and back."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from transformers.utils import logging

from ..config import TopKastConfig
from ..layers import (
    ExpertStack,
    TopKastLayer,
    put_layer,
    put_parameter,
    shape_of,
    sparse_type,
    weight_grid,
)
from ..method import get_method
from ..ops import select_backend
from ..sets import SetPlan, check_finite
from ..storage import NOWHERE, unpack_bits
from .calibration import input_norms
from .carry import carry_over, check_forward, warn_of_lost_hooks
from .cautions import (
    check_blocks,
    check_correction,
    check_here,
    check_model,
    check_names,
    check_not_quantized,
    check_weight,
    warn_of_a_cut,
)
from .correction import correct_in_order, corrected
from .first_sets import first_sets
from .info import DDP_IGNORES, SparseInfo, mark_sparse, sparse_layers
from .targets import find_targets


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)


@torch.inference_mode(False)  # training could not go on with what is made in it
def sparsify(
    model: Model,
    config: TopKastConfig | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    correct: bool = False,
    **settings: Any,
) -> Model:
    """
    Replaces projections of a model by truly sparse Top-KAST layers, in place.

    By default these are the attention and MLP projections inside the decoder blocks (`nn.Linear` and GPT-2's
    `Conv1D`) and every expert of mixture-of-experts blocks; embeddings, the head and whatever is tied to them, norms,
    biases and routers stay dense. Call it after the model is initialised or loaded, and before the optimizer is made.

    Args:
        model (`torch.nn.Module`): a transformers model, or any module if `target_modules` says where.
        config ([`TopKastConfig`], *optional*): the settings.
        calibration (`Iterable`, *optional*): a few inputs of a pretrained model, mappings of its arguments or token
            ids, (batch, tokens). The model runs on them once, and its first sets are those of the largest weights by
            magnitude times that of their inputs, within each row, which costs a pretrained model far less than
            magnitude alone. It stands for `score="activation"`.
        correct (`bool`, *optional*, defaults to `False`): whether the weights that stay are changed to make up for
            those that go, by least squares over the calibration's inputs (SparseGPT). It takes the time of about
            two more runs of the model, and one for each two blocks on the first batch; it holds the Gram matrices,
            (in, in), of a block's layers and experts, and the outputs of two blocks. An error on the way leaves the
            layers before it sparse.
        settings: fields of [`TopKastConfig`] instead, as in `sparsify(model, density=0.2)`.

    Returns:
        `torch.nn.Module`: the same object.

    Raises:
        TypeError: if `model` is no module, `config` no [`TopKastConfig`], or a setting not one of its fields.
        ValueError: if both `config` and settings are given, if the model is sparse already or has PEFT adapters, if
            no layer matches (the message lists candidates), if a named layer is of an unsupported type, tied to
            another or as [`check_carried`] says, if blocks do not fill a layer, if a weight is NaN, infinite, not
            loaded yet or of a dtype that cannot be trained, if DDP or FSDP2 has wrapped the model, if `calibration`
            does not go with `score` or with the model, if `correct` has nothing to make up for, or as [`SetPlan`]
            says. The model is unchanged then.
    """
    check_model(model, "sparsify")
    config = _settled(config, settings, calibrated=calibration is not None)
    if correct:
        check_correction(config, calibrated=calibration is not None)
    if is_compiled_module(model):  # its submodules have other names, and rules are of the model's own
        sparsify(model._orig_mod, config, calibration=calibration, correct=correct)
        return model
    _check_dense(model)
    check_not_quantized(model)
    select_backend(config.backend)
    targets = find_targets(model, config)
    _check_targets(targets, config)  # all before the first swap, so that an error leaves the model as it was
    plan = SetPlan(model, {name: shape_of(dense) for name, dense in targets.items()}, config)
    if correct:
        calibration = [calibration] if isinstance(calibration, Mapping | Tensor) else list(calibration)
    norms = {} if calibration is None else input_norms(model, targets, calibration)
    chosen = first_sets(plan, targets, norms)  # before the first swap: a method that fails leaves the model as it was

    def swap(name: str, gram: Tensor | None = None) -> None:
        dense = targets.pop(name)  # so that each dense weight is freed before the next layer is made
        theta = weight_grid(dense, config)
        active, backward = (unpack_bits(bits, theta.numel()).view(theta.shape) for bits in chosen.pop(name))
        warn_of_lost_hooks(name, dense.weight)
        layer = make_sparse(dense, active, backward, config)
        layer.input_norms = norms.get(name)
        if gram is not None:
            layer.reassign(active, backward, _corrected(name, theta, active, gram))
        replace_module(model, dense, layer)

    if correct:
        correct_in_order(model, list(targets), calibration, swap)
    else:
        for name in list(targets):
            swap(name)
    mark_sparse(model, SparseInfo(config))
    _log_summary(model)
    warn_of_a_cut(model, config)
    return model


@torch.inference_mode(False)
def densify(model: Model) -> Model:
    """
    Puts ordinary dense layers with the weights α back, in place: the model computes what the sparse one did.

    A layer that was a `Conv1D` comes back as one. The weights outside A are gone, as their α is zero.

    Args:
        model (`torch.nn.Module`): a model with sparse layers.

    Returns:
        `torch.nn.Module`: the same object.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if the model has no sparse layer, or one whose `forward` was replaced or whose numbers are
            offloaded, or if it is wrapped by DDP or FSDP2. It is unchanged then.
    """
    check_model(model, "densify")
    names = [name for name, _ in sparse_layers(model)]
    if not names:
        raise ValueError("The model has no sparse layer, so there is nothing to densify.")
    for name, layer in sparse_layers(model):
        check_forward(name, layer)
        check_here(name, (layer.values, layer.columns))
    for name in names:
        layer = model.get_submodule(name)
        replace_module(model, layer, layer.to_dense(layer.weight.detach().clone()))
    for module in model.modules():
        module.__dict__.pop("topkast", None)
        module.__dict__.pop(DDP_IGNORES, None)
    return model


def make_sparse(dense: nn.Module, active: Tensor, backward: Tensor, config: TopKastConfig) -> TopKastLayer:
    """The sparse layer in the place of a convertible one; the masks are bool, (out, in), as its grid has them."""
    place = config.reservoir_device if get_method(config.method).keeps_values else NOWHERE
    settings = config.backend, place, tuple(config.block_size), config.scatter_blocks
    layer = sparse_type(dense)(dense, active, backward, *settings)  # type: ignore[misc]
    layer.powerprop_alpha = config.powerprop_alpha
    return layer


def replace_module(model: nn.Module, old: nn.Module | ExpertStack, new: nn.Module | nn.Parameter) -> None:
    """
    Puts `new` in every place of `model` that holds the object `old`, with what was registered and noted on it. For a
    parameter of experts a layer, and for that layer the parameter.
    """
    if isinstance(old, ExpertStack):
        put_layer(old.owner, old.key, new)
        return
    put = put_parameter if isinstance(new, nn.Parameter) else setattr
    if put is setattr:
        carry_over(old, new)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a second place
            if child is old:
                put(parent, name, new)


def _settled(config: TopKastConfig | None, settings: dict[str, Any], calibrated: bool) -> TopKastConfig:
    """The one config that [`sparsify`] works by; with a calibration, weights are ranked by the inputs too."""
    if not (config is None or isinstance(config, TopKastConfig)):
        raise TypeError(
            "sparsify takes a TopKastConfig, or its fields by name as in sparsify(model, density=0.2), not "
            f"{config!r}."
        )
    if config is not None and settings:
        raise ValueError(f"Give either a TopKastConfig or its fields, not both: got config and {sorted(settings)}.")
    check_names(settings)
    if config is None:
        config = TopKastConfig(**({"score": "activation"} if calibrated else {}) | settings)
    elif calibrated and "score" in config.derived():  # as if it had not been given
        given = {name: value for name, value in config.to_dict().items() if name not in config.derived()}
        config = TopKastConfig.from_dict({**given, "score": "activation"})
    if (config.score == "activation") != calibrated:
        raise ValueError(
            f"score={config.score!r} and calibration {'given' if calibrated else 'left out'}: "
            "score='activation' ranks weights by the inputs that the batches of calibration=... bring about, and only "
            "it uses them. Give both, or neither."
        )
    return config


def _check_dense(model: nn.Module) -> None:
    already = [name for name, _ in sparse_layers(model)]
    if already:
        raise ValueError(
            f"The model is sparse already ({len(already)} layers, the first is '{already[0]}'). Call densify(model) "
            "first to start again with other settings."
        )
    if getattr(model, "peft_config", None):
        raise ValueError(
            "The model has PEFT adapters, whose matrices would become sparse too. Call sparsify first, and "
            "get_peft_model (or add_adapter) on the sparse model."
        )


def _check_targets(targets: dict[str, nn.Module | ExpertStack], config: TopKastConfig) -> None:
    for name, dense in targets.items():
        check_weight(name, dense.weight)
        check_finite(dense.weight.detach(), name)
        if isinstance(dense, ExpertStack):
            check_blocks(name, (dense.out_features, dense.in_features), config.block_size, dense.experts)
        else:
            check_blocks(name, shape_of(dense), config.block_size)


def _corrected(name: str, theta: Tensor, active: Tensor, gram: Tensor) -> Tensor:
    if gram.ndim == 3:  # one for each expert
        experts = zip(theta.chunk(len(gram)), active.chunk(len(gram)), gram)
        return torch.cat([_corrected(name, *expert) for expert in experts])
    try:
        return corrected(theta, active, gram)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"correct=True: the inputs of layer '{name}' give no matrix that can be inverted ({error}). The layers "
            "before it are sparse already: load the model again, and give other batches or leave correct out."
        ) from error


def _log_summary(model: nn.Module) -> None:
    layers = [layer for _, layer in sparse_layers(model)]
    total = sum(layer.numel for layer in layers)
    active = sum(layer.active_count for layer in layers)
    stored = sum(layer.values.numel() for layer in layers)
    dense_rest = sum(p.numel() for p in model.parameters()) - stored
    logger.info(
        f"Top-KAST: {len(layers)} layers with {total:,} weights are sparse at density {active / total:.4g} "
        f"(backward {stored / total:.4g}); {stored:,} of them are trainable, and {dense_rest:,} other parameters stay "
        "dense."
    )
