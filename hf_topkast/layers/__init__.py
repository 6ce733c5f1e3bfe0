"""
What a sparse layer computes and looks like: the masked product, and dense views in the layout of the layer that it
replaced. What it keeps is [`hf_topkast.storage`]'s.
"""

from .base import TopKastLayer
from .linear import SPARSE_TYPES, TopKastConv1D, TopKastLinear, sparse_type


__all__ = [
    "SPARSE_TYPES",
    "TopKastConv1D",
    "TopKastLayer",
    "TopKastLinear",
    "sparse_type",
]
