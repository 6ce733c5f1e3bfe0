"""What a sparse model carries as a whole, and where it is found: its settings, its count of steps, its layers."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..config import TopKastConfig
from ..layers import TopKastLayer


# What the layers of a model were made with.
OF_THE_LAYERS = (
    *("block_size", "scatter_blocks", "split_fused", "target_modules", "exclude_modules"),
    *("reservoir_device", "backend", "powerprop_alpha", "score"),
)
DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


@dataclass
class SparseInfo:
    """
    What a sparse model carries as a whole, as the attribute `topkast`.

    Attributes:
        config ([`TopKastConfig`]): a copy of the settings it was made sparse with. Fields may be set; those that the
            layers were made with are refused.
        step (`int`): optimizer steps that a controller has counted.
    """

    config: TopKastConfig
    step: int = 0

    def __post_init__(self) -> None:
        self.config = copy.deepcopy(self.config)
        self.config.fix(OF_THE_LAYERS, "what the sparse layers were made with; densify the model and sparsify it anew")


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, TopKastLayer]]:
    """Yields the name and the module of every sparse layer, each once, in the order of `named_modules`."""
    for name, module in model.named_modules():
        if isinstance(module, TopKastLayer):
            yield name, module


def mark_sparse(model: nn.Module, info: SparseInfo) -> None:
    """Leaves `info` on the model and on the transformers models inside it, which may be saved by themselves."""
    for module in model.modules():
        if module is model or isinstance(module, PreTrainedModel):
            module.topkast = info
            keep_buffers_from_ddp(module)


def keep_buffers_from_ddp(model: nn.Module) -> None:
    """
    Tells DDP, by the attribute it reads from what it wraps, to leave the buffers of sparse layers alone: it would send
    structure and reservoir to every rank before each forward pass, and gloo cannot send 16-bit integers at all. A
    wrapper around the model, such as PEFT's, has them under other names and needs to be told by itself.
    """
    buffers = [f"{name}.{key}" for name, layer in sparse_layers(model) for key, _ in layer.named_buffers()]
    others = set(getattr(model, DDP_IGNORES, ())) - set(buffers)
    setattr(model, DDP_IGNORES, [*sorted(others), *buffers])


def sparse_info(model: nn.Module) -> SparseInfo:
    """
    What [`sparsify`] left on a model, also where wrappers (DDP, compile) stand around it.

    Raises:
        ValueError: if the model has no sparse layers, or if several calls of [`sparsify`] made them.
    """
    infos = {id(info): info for module in model.modules() if (info := module.__dict__.get("topkast")) is not None}
    if not infos or next(sparse_layers(model), None) is None:
        raise ValueError("The model has no sparse layers: call sparsify(model, density=...) before training.")
    if len(infos) > 1:
        raise ValueError(
            f"The model was made sparse by {len(infos)} calls of sparsify on parts of it, each with its own settings. "
            "Use one call for the whole model, and target_modules to choose the layers."
        )
    return next(iter(infos.values()))


def sparse_root(model: nn.Module) -> nn.Module:
    """The module that [`sparsify`] was called on, inside the wrappers (DDP) that stand around it by now."""
    return next(module for module in model.modules() if "topkast" in module.__dict__)
