"""
Which layers of a model become sparse, the swap of dense layers for sparse ones and back, and what a sparse model
carries as a whole.
"""

from . import resizing as resizing  # refuses it where the head is sparse
from .cautions import check_here
from .counts import SparsityCounts, count_sparsity
from .info import SparseInfo, keep_buffers_from_ddp, mark_sparse, sparse_info, sparse_layers, sparse_root
from .replace import densify, make_sparse, replace_module, sparsify


__all__ = [
    "SparseInfo",
    "SparsityCounts",
    "check_here",
    "count_sparsity",
    "densify",
    "keep_buffers_from_ddp",
    "make_sparse",
    "mark_sparse",
    "replace_module",
    "sparse_info",
    "sparse_layers",
    "sparse_root",
    "sparsify",
]
