"""Which rows of a matrix have sets of their own: query, key and value of a fused projection, gate and up."""

import re

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..layers import layer_named
from ..layers.stacked import StackedMatrices


Rows = slice | Tensor

# By the name of the layer, which transformers keeps from family to family.
HALVES = ("gate_up_proj", "Wi", "input_linear")  # all of the gate, all of up
STACKED = ("c_attn", "qkv_proj", "Wqkv")  # all queries, all keys, all values
GROUPED = ("query_key_value",)  # for each key head: the queries that use it, the key, the value
# Families that lay out a layer of that name in another way.
ALSO_GROUPED = (("gpt_bigcode", "c_attn"), ("minimax", "qkv_proj"))
UNKNOWN = (("codegen", "qkv_proj"),)
LOOKS_FUSED = re.compile(r"qkv|query_key|gate_up|kv_b_proj|in_proj")


def find_parts(
    model: nn.Module, shapes: dict[str, tuple[int, int]], split_fused: bool = True
) -> dict[str, list[Rows]]:
    """
    The rows of each part of every layer's matrix, one where it is not fused. Of experts it is that of any of them: all
    are divided alike.

    Args:
        model (`torch.nn.Module`): the model; the configuration of the transformers model around a layer says how many
            heads it has.
        shapes (`dict[str, tuple[int, int]]`): (out, in) of each layer, by its name in `model`; of experts
            (experts · out, in).
        split_fused (`bool`, *optional*, defaults to `True`): whether fused projections are split.

    Returns:
        `dict[str, list[slice | torch.Tensor]]`: for each layer indices into the rows of a matrix, each row in exactly
        one.

    Raises:
        ValueError: if a layer looks fused but how is not known, or if no layer is fused.
    """
    parts: dict[str, list[Rows]] = {}
    fused = False
    for name, (out_features, _) in shapes.items():
        layer = layer_named(model, name)
        if isinstance(layer, StackedMatrices):
            parts[name] = expert_parts(layer.out_features, layer.halves if split_fused else None)
            fused = fused or layer.halves is not None
        elif split_fused:
            parts[name] = _parts(name, out_features, _config_around(model, name))
            fused = fused or len(parts[name]) > 1
        else:
            parts[name] = [slice(0, out_features)]
    if split_fused and not fused:
        raise ValueError(
            f"split_fused=True: {type(model).__name__} has no fused projection among the layers to be made sparse "
            f"(known are {', '.join((*STACKED, *GROUPED, *HALVES))}). Leave split_fused out."
        )
    return parts


def expert_parts(out_features: int, halves: str | None) -> list[Rows]:
    """The rows of an expert, or of its gate and of its up, whose rows lie in `"halves"` or `"interleaved"`."""
    if halves == "halves":
        return [slice(0, out_features // 2), slice(out_features // 2, out_features)]
    if halves == "interleaved":
        places = torch.arange(0, out_features, 2)
        return [places, places + 1]
    return [slice(0, out_features)]


def _parts(name: str, out_features: int, config: PretrainedConfig | None) -> list[Rows]:
    leaf = name.rpartition(".")[2]
    family = (getattr(config, "model_type", None), leaf)
    if leaf in HALVES and out_features % 2 == 0:
        return [slice(0, out_features // 2), slice(out_features // 2, out_features)]
    if leaf in STACKED + GROUPED and family not in UNKNOWN and "cross" not in name:
        heads = _heads(out_features, config)
        if heads is not None:
            grouped = leaf in GROUPED or family in ALSO_GROUPED
            return _grouped(*heads) if grouped else _stacked(*heads)
    if leaf in HALVES + STACKED + GROUPED or LOOKS_FUSED.search(leaf):
        raise ValueError(
            f"split_fused=True: layer '{name}' with {out_features} outputs is fused in a way that is not known here, "
            "so it cannot be split. Name it in exclude_modules, or leave split_fused out."
        )
    return [slice(0, out_features)]


def _heads(out_features: int, config: PretrainedConfig | None) -> tuple[int, int, int] | None:
    """Queries per key head, key heads and the size of a head, from the output's size; `None` if that does not fit."""
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return None
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    keys, odd = divmod(out_features - queries * size, 2 * size)
    return (queries // keys, keys, size) if keys > 0 and odd == 0 and queries % keys == 0 else None


def _stacked(per_key: int, keys: int, size: int) -> list[Rows]:
    first, second = per_key * keys * size, (per_key + 1) * keys * size
    return [slice(0, first), slice(first, second), slice(second, second + keys * size)]


def _grouped(per_key: int, keys: int, size: int) -> list[Rows]:
    rows = torch.arange((per_key + 2) * keys * size).view(keys, per_key + 2, size)
    return [rows[:, :per_key].flatten(), rows[:, per_key].flatten(), rows[:, per_key + 1].flatten()]


def _config_around(model: nn.Module, name: str) -> PretrainedConfig | None:
    """The configuration of the innermost transformers model that holds a layer."""
    path = name.split(".")
    modules = (model.get_submodule(".".join(path[:depth])) for depth in reversed(range(len(path))))
    return next((module.config for module in modules if isinstance(module, PreTrainedModel)), None)
