"""
The order of rows in blocks whose rows lie far apart in the layer, and side by side only where its sets are kept.

Neighbours among the outputs of a layer have much in common: they are of one head, or one part of the residual stream,
which the layers after cut at the same borders. Where the rows of a block are neighbours, groups of features share
their fate from layer to layer, and their paths hardly cross. So the grid of blocks takes the outputs in another
order: its row i is output i·stride modulo their number, with a stride that is an irrational share of it, which spreads
any run of rows over the whole layer (Weyl's sequence). Such an order takes no memory, and its inverse is like it.

That an order of its own for each layer makes up for what blocks lose is PA-DST's finding (arXiv 2510.14812), which
learns them.
"""

import math


# The golden ratio's: its multiples stay farther apart than any other's.
SHARE = (math.sqrt(5) - 1) / 2


def row_stride(out_features: int, height: int, scatter: bool) -> int:
    """
    The order of the rows of a matrix in its grid of blocks.

    Args:
        out_features (`int`): how many rows it has.
        height (`int`): those of a block.
        scatter (`bool`): whether blocks are scattered.

    Returns:
        `int`: row i of the grid is output i·stride modulo their number; 1 where blocks are of neighbours.
    """
    if not scatter or height == 1:
        return 1
    nearest = round(SHARE * out_features)
    steps = (nearest + sign * distance for distance in range(out_features + 1) for sign in (1, -1))
    return next(step for step in steps if step > 0 and math.gcd(step, out_features) == 1)


def inverse(stride: int, count: int) -> int:
    """The stride that takes so many features back out of the order of this one."""
    return pow(stride, -1, count) if stride != 1 else 1
