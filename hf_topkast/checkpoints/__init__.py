"""
Files on disk: what `save_pretrained` and `from_pretrained` do with sparse layers, the state file beside the weights,
the compact export, and writes that a kill leaves whole.
"""

from .checkpoint import load_checkpoint
from .durable import flush, flush_tree, last_whole_checkpoint
from .loading import rebuild  # (importing it lets `from_pretrained` know sparse layers)
from .saving import OUR_FILES, SETTINGS_NAME, export_sparse
from .state_file import STATE_NAME, CheckpointError, SparseState


__all__ = [
    "OUR_FILES",
    "SETTINGS_NAME",
    "STATE_NAME",
    "CheckpointError",
    "SparseState",
    "export_sparse",
    "flush",
    "flush_tree",
    "last_whole_checkpoint",
    "load_checkpoint",
    "rebuild",
]
