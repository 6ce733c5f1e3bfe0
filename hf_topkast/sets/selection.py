"""Exact, deterministic choice of the largest weights: pure functions of tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def set_size(numel: int, density: float) -> int:
    """Number of weights in a set of the given density: `max(1, round(density * numel))`, at most `numel`."""
    return min(numel, max(1, round(density * numel)))


def check_finite(theta: Tensor, layer_name: str):
    """
    Refuses weights that have no order.

    Raises:
        ValueError: if `theta` holds a NaN or an infinity; the message names the layer and counts them.
    """
    if not bool(torch.isfinite(theta.abs().amax())):  # one pass: the maximum of what holds a NaN is NaN
        bad = int(theta.numel() - torch.isfinite(theta).sum())
        raise ValueError(
            f"Layer '{layer_name}': {bad} of its {theta.numel()} weights are NaN or infinite, so they cannot be "
            "ranked by magnitude. Go back to the last good checkpoint, and lower the learning rate or clip gradients."
        )


def top_mask(scores: Tensor, count: int) -> Tensor:
    """
    Marks the `count` largest scores; among equal scores the lower flat index wins.

    For a fixed `scores`, the masks of growing counts are nested, so A ⊆ B holds by construction (the sets are
    prefixes of one order). Exact also where many scores tie, as they do in bfloat16.

    Args:
        scores (`torch.Tensor`): finite, non-negative, any shape, floating point.
        count (`int`): how many to mark, from 0 to `scores.numel()`.

    Returns:
        `torch.Tensor`: bool, of the shape of `scores`, with exactly `count` entries set.
    """
    flat = scores.flatten()
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()  # exact, and half types are not supported everywhere
    threshold = _kth_largest(flat, count)
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def largest_mask(scores: Tensor, count: int, by_row: bool) -> Tensor:
    """
    As [`top_mask`], in each row by itself if `by_row`: equal shares of the count, the rest to the first rows.

    Args:
        scores (`torch.Tensor`): (rows, columns), finite, floating point.
        count (`int`): how many to mark.
        by_row (`bool`): whether rows are compared with themselves only.
    """
    if not by_row:
        return top_mask(scores, count)
    base, rest = divmod(count, len(scores))
    return torch.cat([_top_of_rows(scores[:rest], base + 1), _top_of_rows(scores[rest:], base)])


def _top_of_rows(scores: Tensor, count: int) -> Tensor:
    """The `count` largest scores of each row, ties to the lower index: bool, of the shape of `scores`."""
    if not len(scores) or count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    threshold = _kth_largest(scores, count)
    mask = scores > threshold
    ties = scores == threshold
    missing = count - mask.sum(1)
    odd = ties.sum(1) > missing  # hardly ever: else all ties are in
    mask |= ties & ~odd[:, None]
    mask[odd] |= ties[odd] & (ties[odd].cumsum(1) <= missing[odd, None])
    return mask


def spread_mask(candidates: Tensor, count: int) -> Tensor:
    """
    Marks `count` of the candidates at equal distances, counted along the flat index.

    Args:
        candidates (`torch.Tensor`): bool, any shape.
        count (`int`): how many to mark, at most as many as there are candidates.

    Returns:
        `torch.Tensor`: bool, of the shape of `candidates`, with exactly `count` entries set.
    """
    places = candidates.flatten().nonzero().squeeze(1)
    mask = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    mask[places[torch.arange(count, device=places.device) * places.numel() // max(count, 1)]] = True
    return mask.view_as(candidates)


def random_mask(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """
    Marks `count` of the candidates, drawn uniformly without replacement.

    Args:
        candidates (`torch.Tensor`): bool, any shape.
        count (`int`): how many to mark, at most as many as there are candidates.
        generator (`torch.Generator`): on the CPU, so that the draw is the same whatever the device.

    Returns:
        `torch.Tensor`: bool, of the shape of `candidates`, with exactly `count` entries set.
    """
    places = candidates.flatten().nonzero().squeeze(1)
    drawn = torch.randperm(places.numel(), generator=generator)[:count]
    mask = torch.zeros(candidates.numel(), dtype=torch.bool, device=candidates.device)
    mask[places[drawn.to(places.device)]] = True
    return mask.view_as(candidates)


def _kth_largest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th largest score along the last dimension, which stays with size 1."""
    place = scores.shape[-1] - count
    if scores.device.type == "cpu":  # the same number, in a seventh of kthvalue's time at 2.4 million weights
        return torch.from_numpy(np.partition(scores.numpy(), place)[..., place : place + 1])
    return scores.kthvalue(place + 1, keepdim=True).values


def block_norms(theta: Tensor, block_size: Sequence[int]) -> Tensor:
    """
    L2 norm of every block of a weight.

    Args:
        theta (`torch.Tensor`): floating point, (out, in).
        block_size (`tuple[int, int]`): (rows, columns) of a block; they divide the shape.

    Returns:
        `torch.Tensor`: float32, (out / rows, in / columns). Summed in float64, so that the order of the sum, which
        differs between devices, is rounded away.
    """
    height, width = block_size
    blocks = theta.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return blocks.double().square().sum((1, 3)).sqrt().float()
