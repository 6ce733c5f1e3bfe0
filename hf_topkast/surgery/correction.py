"""
Weights that stay, corrected for those that go: least squares over a layer's own inputs (SparseGPT, arXiv 2301.00774).

The error of an output is xᵀ(w − ŵ), so what removing a weight does can be made up for by weights whose inputs go with
its own, as the inputs' Gram matrix says. Blocks of the model are corrected one after the other, each for the inputs
that the ones before it, already sparse, give it.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..layers import ExpertStack, layer_named
from .calibration import run_batches
from .shortcut import Shortcut


logger = logging.get_logger(__name__)

# Share of the mean diagonal that is added to the Gram matrix's, and columns that are swept before the rest follows.
DAMPING, COLUMNS = 0.01, 128


def corrected(weight: Tensor, keep: Tensor, gram: Tensor) -> Tensor:
    """
    The weights that stay, changed so that the layer's outputs come as near as a sweep over columns can get them.

    Args:
        weight (`torch.Tensor`): (out, in).
        keep (`torch.Tensor`): bool, (out, in): the weights that stay.
        gram (`torch.Tensor`): Σ x·xᵀ over tokens, (in, in), float32 or wider.

    Returns:
        `torch.Tensor`: (out, in), as `weight` outside of `keep`, in its dtype.
    """
    wide = weight.to(gram.dtype, copy=True)
    damping = DAMPING * gram.diagonal().mean()
    damping = torch.where(damping > 0, damping, 1)  # inputs that are all zero leave nothing to make up for
    gram = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for begin in range(0, len(gram), COLUMNS):
        part = slice(begin, begin + COLUMNS)
        columns, corner = wide[:, part], upper[part, part]
        errors = torch.zeros_like(columns)
        for place in range(columns.shape[1]):
            error = columns[:, place].masked_fill(keep[:, begin + place], 0) / corner[place, place]
            columns[:, place:] -= error[:, None] * corner[place, place:]
            errors[:, place] = error
        wide[:, begin + COLUMNS :] -= errors @ upper[part, begin + COLUMNS :]
    return torch.where(keep, wide.to(weight.dtype), weight)


def correct_in_order(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    replace: Callable[[str, Tensor], None],
):
    """
    Takes the layers of a model block by block, and gives each with its Gram matrix to `replace`.

    Args:
        model (`torch.nn.Module`): the model, of which `replace` changes the layers.
        names (`Sequence[str]`): the layers, in the order in which the model runs them.
        batches (`Sequence`): inputs of the model.
        replace (`Callable`): takes a layer's name and its Gram matrix, (in, in), or those of experts, (experts, in,
            in).
    """
    blocks: dict[str, list[str]] = {}
    for name in names:
        blocks.setdefault(_block_of(name), []).append(name)
    shortcut = Shortcut(model, open=len(batches) > 1)
    checked = -1
    for path, members in blocks.items():
        layers = {name: layer_named(model, name) for name in members}

        def gather(place: int, short: bool, grams: dict[str, Tensor], layers: dict[str, Any] = layers):
            with shortcut.passing(place, short):
                run_batches(model, layers, [batches[place]], functools.partial(_add_to, grams), stop_early=True)

        grams: dict[str, Tensor] = {}
        places = list(range(len(batches)))
        if shortcut.saves:
            # Not the batch that was the last to go the whole way, of which a block may have kept something.
            checked = (checked + 1) % len(batches)
            places.remove(checked)
            if not _agrees(functools.partial(gather, checked), grams):
                shortcut.close()
                logger.warning(
                    f"correct=True: '{members[0]}' reads more than the output of the block before its own. The model "
                    "is run from its beginning for each block that is left, which takes longer."
                )
        for place in places:
            gather(place, shortcut.saves, grams)
        for name in members:
            gram = grams.pop(name)
            replace(name, gram if isinstance(layers[name], ExpertStack) else gram[0])
        shortcut.add(path)


def _agrees(gather: Callable[[bool, dict[str, Tensor]], None], grams: dict[str, Tensor]) -> bool:
    """Adds a batch by the whole way, and says whether the shortcut would have added the same, but for rounding."""
    short: dict[str, Tensor] = {}
    with contextlib.suppress(AssertionError, ValueError):  # a block was given what it does not expect
        gather(True, short)
    gather(False, grams)
    return short.keys() == grams.keys() and all(
        torch.allclose(short[name], gram, rtol=1e-3, atol=1e-4 * float(gram.abs().max()))
        for name, gram in grams.items()
    )


def _add_to(grams: dict[str, Tensor], name: str, x: Tensor, ends: Tensor | None = None):
    """Adds Σ x·xᵀ over some inputs of a layer to its Gram matrix, or to those of its experts."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    bounds = [0, len(rows)] if ends is None else [0, *ends.tolist()]
    if name not in grams:
        grams[name] = rows.new_zeros(len(bounds) - 1, rows.shape[1], rows.shape[1])
    for gram, first, last in zip(grams[name], bounds, bounds[1:]):
        gram.addmm_(rows[first:last].mT, rows[first:last])


def _block_of(name: str) -> str:
    """The part of a name up to its first number: `model.layers.3` of `model.layers.3.mlp.up_proj`."""
    path = name.split(".")
    number = next((place for place, part in enumerate(path) if part.isdigit()), len(path))
    return ".".join(path[: number + 1])
