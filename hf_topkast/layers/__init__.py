"""
What a sparse layer computes and looks like: the masked product, and dense views in the layout of the layer that it
replaced. What it keeps is [`hf_topkast.storage`]'s.
"""

from .base import TopKastLayer
from .experts import (
    EXPERTS_FUNCTION,
    ExpertStack,
    expert_stacks,
    is_decorated,
    layer_named,
    put_layer,
    put_parameter,
    topkast_experts_forward,
)
from .grouped import GroupedLinear, TopKastGroupedLinear
from .linear import SPARSE_TYPES, TopKastConv1D, TopKastLinear, shape_of, sparse_type, weight_grid


__all__ = [
    "EXPERTS_FUNCTION",
    "SPARSE_TYPES",
    "ExpertStack",
    "GroupedLinear",
    "TopKastConv1D",
    "TopKastGroupedLinear",
    "TopKastLayer",
    "TopKastLinear",
    "expert_stacks",
    "is_decorated",
    "layer_named",
    "put_layer",
    "put_parameter",
    "shape_of",
    "sparse_type",
    "topkast_experts_forward",
    "weight_grid",
]
