"""Exact, deterministic choice of the largest weights: pure functions of tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..native import accelerated_by, array, extension, thread_count


# Weights whose squares in float64 a CPU's second cache holds: an eighth of the time of all at once at 16 million.
NORMS_AT_ONCE = 2**16
INT32_MAX = torch.iinfo(torch.int32).max


def set_size(numel: int, density: float) -> int:
    """Number of weights in a set of the given density: `max(1, round(density * numel))`, at most `numel`."""
    return min(numel, max(1, round(density * numel)))


def check_finite(theta: Tensor, layer_name: str):
    """
    Refuses weights that have no order.

    Raises:
        ValueError: if `theta` holds a NaN or an infinity; the message names the layer and counts them.
    """
    if not all(bool(torch.isfinite(extreme)) for extreme in theta.aminmax()):  # of what holds a NaN they are NaN
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
        scores (`torch.Tensor`): finite, any shape, floating point.
        count (`int`): how many to mark, from 0 to `scores.numel()`.

    Returns:
        `torch.Tensor`: bool, of the shape of `scores`, with exactly `count` entries set.
    """
    return largest_masks(scores, (count,), by_row=False)[0]


def largest_mask(scores: Tensor, count: int, by_row: bool) -> Tensor:
    """
    As [`top_mask`], in each row by itself if `by_row`: equal shares of the count, the rest to the first rows.

    Args:
        scores (`torch.Tensor`): (rows, columns), finite, floating point.
        count (`int`): how many to mark.
        by_row (`bool`): whether rows are compared with themselves only.
    """
    return largest_masks(scores, (count,), by_row)[0]


def _by_counting_bits(scores: Tensor, counts: Sequence[int], by_row: bool, magnitudes: bool = False):
    """[`largest_masks`] in two or three passes for all counts together: the C++ sorts and copies nothing."""
    if scores.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not scores.numel():
        return NotImplemented
    scores, numel = scores.contiguous(), scores.numel()
    masks = tuple(torch.empty(scores.shape, dtype=torch.bool, device="cpu") for _ in counts)
    sets = [(min(max(count, 0), numel), mask.data_ptr()) for count, mask in zip(counts, masks)]
    rows = len(scores) if by_row else 1
    extension.mark_largest(array(scores), magnitudes, rows, numel // rows, sets, thread_count(numel))
    return masks


@accelerated_by(_by_counting_bits)
def largest_masks(scores: Tensor, counts: Sequence[int], by_row: bool, magnitudes: bool = False) -> tuple[Tensor, ...]:
    """
    Masks as of [`largest_mask`], for one or two counts at once; with `magnitudes` scores rank without their signs.
    """
    scores = scores.abs() if magnitudes else scores
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()  # exact, and half types are not supported everywhere
    if not by_row:
        return tuple(_top(scores, count) for count in counts)
    shares = (divmod(count, len(scores)) for count in counts)
    return tuple(
        torch.cat([_top_of_rows(scores[:rest], base + 1), _top_of_rows(scores[rest:], base)]) for base, rest in shares
    )


def _top(scores: Tensor, count: int) -> Tensor:
    """The `count` largest of all scores."""
    flat = scores.flatten()
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_largest(flat, count)
    mask = flat > threshold
    missing = count - int(mask.count_nonzero())
    ties = flat == threshold
    if int(ties.count_nonzero()) == missing:
        mask |= ties
    else:  # a list of them alone
        mask[ties.nonzero().squeeze(1)[:missing]] = True
    return mask.view_as(scores)


def _top_of_rows(scores: Tensor, count: int) -> Tensor:
    """The `count` largest scores of each row, ties to the lower index: bool, of the shape of `scores`."""
    if not len(scores) or count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_largest(scores, count)
    mask = scores > threshold
    ties = scores == threshold
    missing = count - mask.sum(1)
    odd = ties.sum(1) > missing  # seldom: else all ties are in
    mask |= ties & ~odd[:, None]
    mask[odd] |= ties[odd] & (ties[odd].cumsum(1, dtype=torch.int32) <= missing[odd, None])
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
    if scores.dtype != torch.float32 or scores.ndim > 1:
        return scores.kthvalue(place + 1, keepdim=True).values
    return _kth_largest_by_counting(scores, count)


def _kth_largest_by_counting(scores: Tensor, count: int) -> Tensor:
    """
    [`_kth_largest`] of one list in float32: by how often each upper half of a number occurs, then each lower half of
    those in question. A GPU counts with all of its multiprocessors, where `kthvalue` gives each list to one.
    """
    bits = scores.contiguous().view(torch.int32)
    keys = bits ^ ((bits >> 31) & INT32_MAX)  # integers in the order of the numbers
    upper, count = _kth_largest_bin((keys >> 16) + 2**15, count)
    lower, _ = _kth_largest_bin(keys[keys >> 16 == upper - 2**15] & (2**16 - 1), count)
    key = (upper - 2**15) * 2**16 + lower
    bits = bits.new_full((1,), key)
    return (bits ^ ((bits >> 31) & INT32_MAX)).view(torch.float32)


def _kth_largest_bin(numbers: Tensor, count: int) -> tuple[int, int]:
    """The `count`-th largest of integers from 0 to 2¹⁶ - 1, and the how manieth of those equal to it that is."""
    above = torch.bincount(numbers, minlength=2**16).flip(0).cumsum(0)
    place = int(torch.searchsorted(above, count))
    return 2**16 - 1 - place, count - (int(above[place - 1]) if place else 0)


def _norms_in_cpp(theta: Tensor, block_size: Sequence[int]):
    """[`block_norms`] in one pass over the weight."""
    height, width = block_size
    if theta.dtype != torch.float32 or theta.ndim != 2 or theta.shape[0] % height or theta.shape[1] % width:
        return NotImplemented
    theta, (rows, columns) = theta.contiguous(), theta.shape
    norms = torch.empty(rows // height, columns // width, device="cpu")
    sizes = rows, columns, height, width
    extension.block_norms(theta.data_ptr(), *sizes, norms.data_ptr(), thread_count(theta.numel()))
    return norms


@accelerated_by(_norms_in_cpp)
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
    if theta.device.type != "cpu" or not theta.numel():
        return _norms_at_once(theta, block_size)
    rows = max(1, NORMS_AT_ONCE // (theta.shape[1] * block_size[0])) * block_size[0]
    return torch.cat([_norms_at_once(part, block_size) for part in theta.split(rows)])


def _norms_at_once(theta: Tensor, block_size: Sequence[int]) -> Tensor:
    height, width = block_size
    blocks = theta.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return blocks.double().square().sum((1, 3)).sqrt().float()
