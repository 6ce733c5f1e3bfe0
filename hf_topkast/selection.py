"""Exact, deterministic choice of the largest weights: pure functions of tensors."""

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
    finite = torch.isfinite(theta)
    if not bool(finite.all()):
        bad = int(theta.numel() - finite.sum())
        raise ValueError(
            f"Layer '{layer_name}': {bad} of its {theta.numel()} weights are NaN or infinite, so they cannot be "
            "ranked by magnitude. Go back to the last good checkpoint, and lower the learning rate or clip gradients."
        )


def top_mask(scores: Tensor, count: int) -> Tensor:
    """
    Marks the `count` largest scores; among equal scores the lower flat index wins.

    For a fixed `scores`, the masks of growing counts are nested, so A ⊆ B holds by construction (DESIGN of the sets:
    prefixes of one order). Exact also where many scores tie, as they do in bfloat16.

    Args:
        scores (`torch.Tensor`): finite, non-negative, any shape, floating point.
        count (`int`): how many to mark, from 0 to `scores.numel()`.

    Returns:
        `torch.Tensor`: bool, of the shape of `scores`, with exactly `count` entries set.
    """
    flat = scores.flatten()
    numel = flat.numel()
    if count >= numel:
        return torch.ones_like(scores, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()  # exact, and kthvalue is not implemented for half types everywhere
    threshold = flat.kthvalue(numel - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)
