"""What a plan of sets looks at: what methods give, which layers overrides name, and blocks across parts."""

import re

import torch
from torch import Tensor

from ..method import LayerView
from ..storage import set_sizes
from .fused import Rows


def check_sets(method: str, name: str, view: LayerView, active: Tensor, backward: Tensor):
    """
    Whether a method gave what it was asked for.

    Raises:
        ValueError: if it did not; the message names method and layer.
    """
    fit = [mask.dtype == torch.bool and mask.shape == view.theta.shape for mask in (active, backward)]
    *sizes, outside = set_sizes(active, backward) if all(fit) else (None, None, 0)
    asked = view.size, view.backward_size
    for kind, mask, found, size in zip("AB", (active, backward), sizes, asked):
        if found != size:
            found = f"{int(mask.count_nonzero())} of {tuple(mask.shape)}" if mask.dtype == torch.bool else mask.dtype
            raise ValueError(
                f"method={method!r} gave layer '{name}' a set {kind} of {found}, where {size} of "
                f"{tuple(view.theta.shape)} are asked for, as a bool mask. Mend the method's function."
            )
    if outside:
        raise ValueError(f"method={method!r} gave layer '{name}' an A that is not inside B. Mend its function.")


def match_overrides(overrides: dict[str, float], names) -> dict[str, float]:
    """
    The density of each layer that an override names; the first that matches its whole name counts.

    Raises:
        ValueError: if an override matches no layer.
    """
    for pattern in overrides:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(
                f"density_overrides: {pattern!r} matches the whole name of no layer that becomes sparse. They are "
                f"{', '.join(list(names)[:12])}{', ...' if len(names) > 12 else ''}."
            )
    matches = ((name, [key for key in overrides if re.fullmatch(key, name)]) for name in names)
    return {name: overrides[found[0]] for name, found in matches if found}


def block_rows(name: str, rows: Rows, out_features: int, height: int) -> Rows:
    """
    The rows of blocks that a part's rows fill.

    Raises:
        ValueError: if a block lies in two parts.
    """
    if height == 1:
        return rows
    if isinstance(rows, slice):
        first, last, _ = rows.indices(out_features)
        blocks, whole = slice(first // height, last // height), first % height == last % height == 0
    else:
        blocks = rows[::height] // height
        whole = torch.equal((blocks[:, None] * height + torch.arange(height)).flatten(), rows)
    if not whole:
        raise ValueError(
            f"split_fused=True: a block of {height} rows of layer '{name}' would lie in two of its parts. Choose a "
            "block_size that divides the head size, with one row if gate and up lie in turn, or leave split_fused out."
        )
    return blocks
