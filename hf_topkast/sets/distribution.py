"""
How a density is shared out among layers: pure functions of their shapes and, for `"global"`, of their weights.

    distribute(shapes, densities, magnitudes, block_size) -> sizes

with `shapes` the (out, in) of each layer, or of each part of a fused one, in blocks of `block_size`; `densities` over
all of them together; and `magnitudes` a function that yields |θ| of each, one at a time and in the same order, each
time it is called. `sizes` has a list for each density: how many blocks every layer gets, at least one and at most all
of them. Without blocks they are single weights.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .selection import set_size


Shapes = Sequence[tuple[int, int]]
Magnitudes = Callable[[], Iterator[Tensor]]

# A non-negative double has 63 bits, which order like the number itself. They are read in digits of (shift, width).
DIGITS = ((46, 17), (29, 17), (14, 15), (0, 14))
SINGLE_SHIFT = 29  # below it all bits are zero in what was a single or a half before


def uniform(
    shapes: Shapes, densities: Sequence[float], magnitudes: Magnitudes, block_size: Sequence[int] = (1, 1)
) -> list[list[int]]:
    """Every layer gets the same density."""
    return [[set_size(rows * columns, density) for rows, columns in shapes] for density in densities]


def erdos_renyi(
    shapes: Shapes, densities: Sequence[float], magnitudes: Magnitudes, block_size: Sequence[int] = (1, 1)
) -> list[list[int]]:
    """
    A layer's density is in proportion to (out + in) / (out · in), so small and narrow layers stay denser (Mocanu et
    al. 2018). Where that exceeds 1 the layer is dense and the others share the rest. The total is exact.
    """
    limits = [rows * columns for rows, columns in shapes]
    height, width = block_size
    weights = [rows * height + columns * width for rows, columns in shapes]  # out + in
    return [apportion(_total(limits, density), weights, limits) for density in densities]


def global_threshold(
    shapes: Shapes, densities: Sequence[float], magnitudes: Magnitudes, block_size: Sequence[int] = (1, 1)
) -> list[list[int]]:
    """
    The largest weights of all layers together: larger |θ| first, ties by the order of the layers. The total is exact.

    Every layer keeps at least its largest weight. The layers are never put together: their numbers are counted digit
    by digit, until the size of the smallest chosen weight is known.
    """
    limits = [rows * columns for rows, columns in shapes]
    totals = [_total(limits, density) for density in densities]
    ranks = [total - len(limits) for total in totals]  # of the smallest chosen, among all but each layer's largest
    thresholds, left, double = [0] * len(totals), list(ranks), False
    for shift, width in DIGITS:
        if shift < SINGLE_SHIFT and not double:
            thresholds = [threshold << width for threshold in thresholds]
            continue
        counts = torch.zeros(len(totals), 2**width, dtype=torch.int64)
        for magnitude in magnitudes():
            double = double or magnitude.dtype == torch.float64
            keys = _keys(magnitude)
            for count, threshold in zip(counts, thresholds):
                digits = keys[keys >> (shift + width) == threshold] >> shift & 2**width - 1
                count += torch.bincount(digits, minlength=2**width).cpu()
        for place, count in enumerate(counts):
            at_least = count.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
            digit = max(0, int((at_least >= left[place]).sum()) - 1)
            left[place] -= int(at_least[digit] - count[digit])
            thresholds[place] = thresholds[place] << width | digit

    sizes = [[] for _ in totals]
    for magnitude in magnitudes():
        keys = _keys(magnitude)
        for place, threshold in enumerate(thresholds):
            if ranks[place] == 0:
                sizes[place].append(1)
                continue
            ties = min(left[place], int((keys == threshold).sum()))
            left[place] -= ties
            sizes[place].append(1 + int((keys > threshold).sum()) + ties)
    return sizes


DISTRIBUTIONS = {"uniform": uniform, "erdos_renyi": erdos_renyi, "global": global_threshold}


def apportion(total: int, weights: Sequence[int], limits: Sequence[int]) -> list[int]:
    """
    Shares `total` out in proportion to `weights`, each share at least 1 and at most its limit.

    What the rounding down leaves goes to the largest remainders, and of equal ones to the first. The sum is `total`,
    which must lie between the number of shares and the sum of the limits.
    """
    shares, open_places = [0] * len(weights), list(range(len(weights)))
    while True:
        weight = sum(weights[place] for place in open_places)
        full = [place for place in open_places if total * weights[place] >= limits[place] * weight]
        if not full:
            break
        for place in full:
            shares[place] = limits[place]
            total -= limits[place]
        open_places = [place for place in open_places if place not in full]
    remainders = {}
    for place in open_places:
        shares[place], remainders[place] = divmod(total * weights[place], weight)
    odd = total - sum(shares[place] for place in open_places)
    for place in sorted(open_places, key=lambda place: -remainders[place])[:odd]:
        shares[place] += 1
    while 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] = 1
    return shares


def _total(limits: Sequence[int], density: float) -> int:
    return max(len(limits), set_size(sum(limits), density))


def _keys(magnitude: Tensor) -> Tensor:
    """Integers in the order of the numbers, int64, (n,); that of the largest is -1, which no digit matches."""
    keys = magnitude.flatten().to(torch.float64, copy=True).view(torch.int64)
    keys[keys.argmax()] = -1
    return keys
