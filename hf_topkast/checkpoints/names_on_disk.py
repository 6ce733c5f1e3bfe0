"""
From names on disk to names in the model, by transformers' own rules: it stores the weights of many families under
other names than the model's, or in other pieces, as the experts of a stack one by one.
"""

import copy
import os
from types import SimpleNamespace

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from .state_file import CheckpointError


# What a converter raises at tensors that it cannot put together.
MISFITS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def to_model_names(
    model: nn.Module, weights: dict[str, Tensor], dense: dict[str, Tensor], directory: str | os.PathLike
) -> dict[str, Tensor]:
    """
    The weights of a directory as the model has them: renamed, merged, split and permuted as `from_pretrained` does it.

    A name that leads to none of the model's stays as it is, for whoever compares the two.

    Args:
        model (`torch.nn.Module`): whose names they become; only a `PreTrainedModel` can have others on disk.
        weights (`dict[str, torch.Tensor]`): by their names on disk. Emptied on the way, so that what is merged is not
            held twice.
        dense (`dict[str, torch.Tensor]`): the state dict that the model has as a dense one. Only names, shapes and
            dtypes count: tensors on the meta device will do.
        directory (`str` or `os.PathLike`): where the weights are from.

    Returns:
        `dict[str, torch.Tensor]`: the same numbers by their names in the model.

    Raises:
        CheckpointError: if what is on disk does not make up a tensor of the model, or does so twice.
    """
    if not isinstance(model, PreTrainedModel):
        return weights
    transforms = _transforms_of(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    groups: dict[tuple, list[tuple[str, str | None]]] = {}  # the pieces of one tensor, or a key that is one by itself
    for key in sorted(weights, key=dot_natural_key):  # experts by number
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, dense)
        if name not in dense:  # the key is the model's own already, or nobody's
            name, pattern = key, None
        groups.setdefault((name, None if pattern else key), []).append((key, pattern))

    named: dict[str, Tensor] = {}
    for (name, _), pieces in groups.items():
        first, pattern = pieces[0]
        if pattern is None:
            made = {name: weights.pop(first)}
        else:
            converter = copy.deepcopy(by_pattern[pattern])
            for key, pattern in pieces:
                converter.add_tensor(name, key, pattern, weights.pop(key))
            try:
                made = _convert(converter, name, model, dense)
            except MISFITS as error:
                raise CheckpointError(
                    f"{directory} is damaged or belongs to another model: '{first}' and {len(pieces) - 1} other "
                    f"tensors there do not make up '{name}' ({error})."
                ) from error
        if twice := sorted(named.keys() & made.keys()):
            raise CheckpointError(f"{directory} has the weights of '{twice[0]}' twice, once as '{first}'.")
        named |= made
    return named


def _transforms_of(model: PreTrainedModel) -> list[WeightTransform]:
    """What `from_pretrained` applies to names on disk, first a `key_mapping` that this model was loaded with."""
    stock = get_model_conversion_mapping(model)
    known = [(transform.source_patterns, transform.target_patterns) for transform in stock]
    used = getattr(model, "_weight_conversions", None) or []  # by the from_pretrained that made the model
    return [each for each in used if (each.source_patterns, each.target_patterns) not in known] + stock


def _convert(
    converter: WeightConverter, name: str, model: PreTrainedModel, dense: dict[str, Tensor]
) -> dict[str, Tensor]:
    # Some look at shapes and dtypes of parameters, and those of a sparse model are not the dense one's.
    shapes = SimpleNamespace(get_parameter=dense.__getitem__)
    made = converter.convert(name, model=shapes, config=model.config)
    return {target: tensor[0] if isinstance(tensor, list) else tensor for target, tensor in made.items()}
