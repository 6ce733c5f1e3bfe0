"""Which layers become sparse, and the swap there and back."""

import re

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .config import TopKastConfig
from .layers import TopKastConv1D, TopKastLayer, TopKastLinear
from .methods import get_method
from .selection import check_finite


logger = logging.get_logger(__name__)

# Exact types: a subclass (quantised, LoRA, ...) computes something else with its weight.
SPARSE_TYPES: dict[type[nn.Module], type[TopKastLayer]] = {nn.Linear: TopKastLinear, Conv1D: TopKastConv1D}

# Routers of mixture-of-experts blocks: tiny, and a pruned one would cut experts off.
ROUTER_NAME = re.compile(r"(^|_)(gate|router)$")


def sparsify(model: nn.Module, config: TopKastConfig | None = None, **settings) -> nn.Module:
    """
    Replaces projections of a model by truly sparse Top-KAST layers, in place.

    By default these are the attention and MLP projections inside the decoder blocks (`nn.Linear` and GPT-2's
    `Conv1D`); embeddings, the head and whatever is tied to them, norms, biases and routers stay dense. Call it after
    the model is initialised or loaded, and before the optimizer is made.

    Args:
        model (`torch.nn.Module`): a transformers model, or any module if `target_modules` says where.
        config ([`TopKastConfig`], *optional*): the settings.
        settings: fields of [`TopKastConfig`] instead, as in `sparsify(model, density=0.2)`.

    Returns:
        `torch.nn.Module`: the same object.

    Raises:
        ValueError: if both `config` and settings are given, if the model is sparse already, if no layer matches (the
            message lists candidates), if a named layer is of an unsupported type or tied to another, or if a weight is
            NaN or infinite. The model is unchanged then.
    """
    if config is not None and settings:
        raise ValueError(f"Give either a TopKastConfig or its fields, not both: got config and {sorted(settings)}.")
    config = config or TopKastConfig(**settings)
    already = [name for name, _ in sparse_layers(model)]
    if already:
        raise ValueError(
            f"The model is sparse already ({len(already)} layers, the first is '{already[0]}'). Call densify(model) "
            "first to start again with other settings."
        )
    targets = find_targets(model, config)
    choose = get_method(config.method)
    for name, dense in targets.items():  # all before the first swap, so that an error leaves the model as it was
        check_finite(dense.weight.detach(), name)
    for dense in targets.values():
        active, backward = choose(weight_rows(dense), config.density, config.backward_density)
        replace_module(model, dense, make_sparse(dense, active, backward, config))
    mark_sparse(model, config)
    _log_summary(model, config)
    return model


def densify(model: nn.Module) -> nn.Module:
    """
    Puts ordinary dense layers with the weights α back, in place: the model computes what the sparse one did.

    A layer that was a `Conv1D` comes back as one. The weights outside A are gone, as their α is zero.

    Args:
        model (`torch.nn.Module`): a model with sparse layers.

    Returns:
        `torch.nn.Module`: the same object.

    Raises:
        ValueError: if the model has no sparse layer.
    """
    layers = list(sparse_layers(model))
    if not layers:
        raise ValueError("The model has no sparse layer, so there is nothing to densify.")
    for _, layer in layers:
        replace_module(model, layer, layer.to_dense(layer.weight))
    for module in model.modules():
        for mark in ("topkast_config", "topkast_step"):
            module.__dict__.pop(mark, None)
    return model


def sparse_layers(model: nn.Module):
    """Yields the name and the module of every sparse layer, each once, in the order of `named_modules`."""
    for name, module in model.named_modules():
        if isinstance(module, TopKastLayer):
            yield name, module


def mark_sparse(model: nn.Module, config: TopKastConfig, step: int = 0):
    """Leaves on the model what belongs to it as a whole: its configuration and the optimizer steps taken so far."""
    model.topkast_config, model.topkast_step = config, step


def sparse_root(model: nn.Module) -> nn.Module:
    """
    The module that [`sparsify`] was called with, also where wrappers (DDP, compile) stand around it.

    Raises:
        ValueError: if the model was not sparsified.
    """
    for module in model.modules():
        if "topkast_config" in module.__dict__:
            return module
    raise ValueError("The model has no sparse layers: call sparsify(model, density=...) before training.")


def make_sparse(dense: nn.Module, active: Tensor, backward: Tensor, config: TopKastConfig) -> TopKastLayer:
    """The sparse layer in the place of a convertible one; `active` and `backward` are bool, (out, in)."""
    return SPARSE_TYPES[type(dense)](dense, active, backward, config.backend, config.reservoir_device)


def weight_rows(dense: nn.Module) -> Tensor:
    """The weight of a convertible layer as (out, in), whatever its stock layout; detached."""
    weight = dense.weight.detach()
    return weight.T.contiguous() if SPARSE_TYPES[type(dense)].stores_transposed else weight


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module):
    """Puts `new` in every place of `model` that holds the object `old`."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a second place
            if child is old:
                setattr(parent, name, new)


def find_targets(model: nn.Module, config: TopKastConfig) -> dict[str, nn.Module]:
    """
    The dense layers that `config` makes sparse, by name.

    Raises:
        ValueError: as [`sparsify`] says.
    """
    shared = _tied_weights(model)
    excluded = config.exclude_modules
    if config.target_modules is None or config.target_modules == "all-linear":
        blocks_only = config.target_modules is None
        targets = {
            name: module
            for name, module in _convertible(model).items()
            if id(module.weight) not in shared
            and module is not _output_embeddings(model)
            and not ROUTER_NAME.search(name.rpartition(".")[2])
            and not (blocks_only and not _inside_blocks(model, name))
            and not _matches(name, excluded)
        }
    else:
        targets = {
            name: module
            for name, module in model.named_modules()
            if _matches(name, config.target_modules) and not _matches(name, excluded)
        }
        targets = {name: module for name, module in targets.items() if _is_layer(module, name, config.target_modules)}
        for name, module in targets.items():
            _check_supported(name, module, shared)
    if not targets:
        raise ValueError(_nothing_matched(model, config))
    return targets


def _convertible(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module) in SPARSE_TYPES}


def _inside_blocks(model: nn.Module, name: str) -> bool:
    """Whether a module lies in a stack of repeated blocks: under an entry of an `nn.ModuleList`."""
    path = name.split(".")
    return any(isinstance(model.get_submodule(".".join(path[:depth])), nn.ModuleList) for depth in range(len(path)))


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def _tied_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module owns."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _matches(name: str, rule: list[str] | str | None) -> bool:
    """PEFT's rules: a regular expression for the whole name, or a list of names matched by suffix."""
    if rule is None:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in rule)


def _is_layer(module: nn.Module, name: str, rule: list[str] | str) -> bool:
    """A regular expression may sweep over containers and activations; a name in a list means that very module."""
    return not isinstance(rule, str) or any(True for _ in module.parameters(recurse=False))


def _check_supported(name: str, module: nn.Module, shared: set[int]):
    if type(module) not in SPARSE_TYPES:
        supported = " and ".join(kind.__name__ for kind in SPARSE_TYPES)
        raise ValueError(
            f"target_modules names '{name}', a {type(module).__name__}, which cannot be made sparse: only {supported} "
            "can. Name those layers, or use exclude_modules."
        )
    if id(module.weight) in shared:
        raise ValueError(
            f"target_modules names '{name}', but its weight is tied to another module's and must stay dense. "
            "Add it to exclude_modules, or untie the weights first (tie_word_embeddings=False)."
        )


def _nothing_matched(model: nn.Module, config: TopKastConfig) -> str:
    names = list(_convertible(model))
    if not names:
        return f"No layer of {type(model).__name__} can be made sparse: it has no nn.Linear and no Conv1D."
    listed = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return (
        f"No layer of {type(model).__name__} matches target_modules={config.target_modules!r} without "
        f"exclude_modules={config.exclude_modules!r}. Candidates: {listed}. Give suffixes of such names, one regular "
        "expression for a whole name, or 'all-linear'."
    )


def _log_summary(model: nn.Module, config: TopKastConfig):
    layers = [layer for _, layer in sparse_layers(model)]
    total = sum(layer.numel for layer in layers)
    stored = sum(layer.values.numel() for layer in layers)
    dense_rest = sum(p.numel() for p in model.parameters()) - stored
    logger.info(
        f"Top-KAST: {len(layers)} layers with {total:,} weights are sparse at density {config.density:g} "
        f"(backward {config.backward_density:g}); {stored:,} of them are trainable, and {dense_rest:,} other "
        "parameters stay dense."
    )
