"""Which layers of a model become sparse."""

import re

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from ..config import TopKastConfig
from ..layers import SPARSE_TYPES, ExpertStack, TopKastLayer, expert_stacks, is_decorated, sparse_type
from .carry import check_carried, check_forward


# Routers of mixture-of-experts blocks: tiny, and a pruned one would cut experts off.
ROUTER_NAME = re.compile(r"(^|_)(gate|router)$")


def find_targets(model: nn.Module, config: TopKastConfig) -> dict[str, nn.Module | ExpertStack]:
    """
    The dense layers that `config` makes sparse, by name: modules, and parameters that hold experts.

    Raises:
        ValueError: as [`sparsify`] says.
    """
    if sparse_type(model) is not None:
        raise ValueError(
            f"The model is a single {type(model).__name__}, which cannot be replaced in place: put it into a module, "
            "such as nn.Sequential(layer), and sparsify that."
        )
    shared, rule, excluded = _tied_weights(model), config.target_modules, config.exclude_modules
    for field in ("target_modules", "exclude_modules"):
        _check_every_entry_matches(model, field, getattr(config, field))
    layers = _layers(model)
    _check_experts_are_here(model, rule, excluded)
    if rule is None or rule == "all-linear":
        _check_nothing_stacked(model, layers, excluded)
        chosen = _projections(model, layers, shared, blocks_only=rule is None)
    else:
        owners = {id(layer.owner) for layer in layers.values() if isinstance(layer, ExpertStack)}
        named = {name: layer for name, layer in layers.items() if name and id(layer) not in owners}
        chosen = {name: layer for name, layer in named.items() if _names(rule, name, layer)}
    targets = {name: layer for name, layer in chosen.items() if not _matches(name, excluded, layer)}
    for name, layer in targets.items():
        if isinstance(layer, tuple(SPARSE_TYPES)):
            check_carried(name, layer)
        elif isinstance(layer, ExpertStack):
            check_forward(name.rpartition(".")[0], layer.owner)
        _check_supported(name, layer, shared)
    if not targets:
        raise ValueError(
            f"No layer of {type(model).__name__} is left to be made sparse: say which in target_modules. "
            f"{_candidates(model)}"
        )
    return targets


def _layers(model: nn.Module) -> dict[str, nn.Module | ExpertStack]:
    """All modules, and the parameters that hold experts behind the module whose they are."""
    stacks: dict[int, dict[str, ExpertStack]] = {}
    for name, stack in expert_stacks(model).items():
        stacks.setdefault(id(stack.owner), {})[name] = stack
    layers: dict[str, nn.Module | ExpertStack] = {}
    for name, module in model.named_modules():
        layers[name] = module
        layers.update(stacks.get(id(module), {}))
    return layers


def _projections(
    model: nn.Module, layers: dict[str, nn.Module | ExpertStack], shared: set[int], blocks_only: bool
) -> dict[str, nn.Module | ExpertStack]:
    """
    Every convertible layer but the head, routers and tied weights; all of them or those inside the blocks. Also those
    with a weight that is computed: they must not stay dense unnoticed.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    blocks = _block_modules(model)
    return {
        name: layer
        for name, layer in layers.items()
        if (sparse_type(layer) is not None or _is_computed(layer))
        and layer is not head
        and id(layer.weight if isinstance(layer, ExpertStack) else layer._parameters.get("weight")) not in shared
        and not _is_in_router(name)
        and (not blocks_only or name in blocks or name.rpartition(".")[0] in blocks)
    }


def _is_in_router(name: str) -> bool:
    *path, leaf = name.split(".")
    return ROUTER_NAME.search(leaf) is not None or not {"gate", "router"}.isdisjoint(path)


def _is_computed(module: nn.Module) -> bool:
    projection = isinstance(module, tuple(SPARSE_TYPES)) and not isinstance(module, TopKastLayer)
    return projection and module._parameters.get("weight") is None


def _convertible(model: nn.Module) -> dict[str, nn.Module | ExpertStack]:
    return {name: layer for name, layer in _layers(model).items() if sparse_type(layer) is not None}


def _block_modules(model: nn.Module) -> dict[str, nn.Module]:
    """What lies in stacks of repeated blocks, under an `nn.ModuleList`, except in towers for images or sound."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    towers = [module for module in model.modules() if module is not model and not _reads_text(module)]
    inside = {id(module) for stack in stacks for module in stack.modules()}
    inside -= {id(module) for tower in towers for module in tower.modules()}
    return {name: module for name, module in model.named_modules() if id(module) in inside}


def _reads_text(module: nn.Module) -> bool:
    return not isinstance(module, PreTrainedModel) or "text" in getattr(module, "input_modalities", "text")


def _check_experts_are_here(model: nn.Module, rule: list[str] | str | None, excluded: list[str] | str | None):
    """Whether this process has the numbers of all experts, as parameters."""
    everywhere = rule is None or rule == "all-linear"
    for name, module in model.named_modules():
        if not is_decorated(module) or _matches(name, excluded) or not (everywhere or _matches(name, rule)):
            continue
        spread = any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False))
        if spread or getattr(module, "_is_expert_parallel", False) or getattr(module, "_is_hooked", False):
            raise ValueError(
                f"'{name}' is split over processes (expert or tensor parallelism). Load the model without it, or say "
                f"exclude_modules={[name.rpartition('.')[2]]}."
            )
        for key in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            if key not in module._parameters and key not in module._modules:
                raise ValueError(
                    f"'{name}.{key}' is no parameter but computed from others, and a sparse layer would have a stale "
                    "copy of it. Put the parameter back in its place first, or name the layer in exclude_modules."
                )


def _check_nothing_stacked(
    model: nn.Module, layers: dict[str, nn.Module | ExpertStack], excluded: list[str] | str | None
):
    """What lies in 3-D parameters may be most of a model's weights: it must not stay dense unnoticed."""
    stacked = {
        name: f"'{name}.{key}' {tuple(parameter.shape)}"
        for name, module in _block_modules(model).items()
        if not isinstance(module, _ConvNd) and not _matches(name, excluded)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape[1:]) > 1 and f"{name}.{key}" not in layers
    }
    if stacked:
        leaves = sorted({name.rpartition(".")[2] for name in stacked})
        raise ValueError(
            f"{type(model).__name__} has {next(iter(stacked.values()))}: several matrices in one parameter, in a form "
            f"that is not known here. They cannot be made sparse; only {_supported()} can, and experts as "
            "transformers holds them, not quantised. To keep these dense and make the other projections sparse say "
            f"exclude_modules={leaves}."
        )


def _tied_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one module owns."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {key for key, count in owners.items() if count > 1}


def _matches(name: str, rule: list[str] | str | None, layer: nn.Module | ExpertStack | None = None) -> bool:
    """
    PEFT's rules: a regular expression for the whole name, or a list of names matched by suffix. A parameter of experts
    is also meant by the name of its module.
    """
    if rule is None:
        return False
    if isinstance(layer, ExpertStack) and _matches(name.rpartition(".")[0], rule):
        return True
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in rule)


def _names(rule: list[str] | str, name: str, layer: nn.Module | ExpertStack) -> bool:
    """A regular expression may sweep over containers and activations; a name in a list means that very module."""
    has_weights = isinstance(layer, ExpertStack) or next(layer.parameters(recurse=False), None) is not None
    return _matches(name, rule, layer) and (has_weights or not isinstance(rule, str))


def _check_every_entry_matches(model: nn.Module, field: str, rule: list[str] | str | None):
    """A misspelt name must not pass unnoticed beside others that match."""
    if rule is None or rule == "all-linear":
        return
    for entry in [rule] if isinstance(rule, str) else [[name] for name in rule]:
        if not any(_matches(name, entry) for name in _layers(model)):
            raise ValueError(
                f"{field}={rule!r}: nothing in {type(model).__name__} matches {entry!r}. Give suffixes of module "
                "names, one regular expression for a whole name, or for target_modules 'all-linear'. "
                f"{_candidates(model)}"
            )


def _check_supported(name: str, module: nn.Module, shared: set[int]):
    if sparse_type(module) is None:
        raise ValueError(
            f"target_modules names '{name}', a {type(module).__name__}, which cannot be made sparse: only "
            f"{_supported()} can. Name those layers, or use exclude_modules."
        )
    if id(module.weight) in shared:
        raise ValueError(
            f"target_modules names '{name}', but its weight is tied to another module's and must stay dense. "
            "Add it to exclude_modules, or untie the weights first (tie_word_embeddings=False)."
        )


def _supported() -> str:
    return " and ".join(kind.__name__ for kind in SPARSE_TYPES)


def _candidates(model: nn.Module) -> str:
    names = list(_convertible(model))
    if not names:
        return "It has no nn.Linear and no Conv1D."
    return f"Candidates: {', '.join(names[:12])}" + (f", ... ({len(names)} in all)." if len(names) > 12 else ".")
