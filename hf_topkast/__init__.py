"""hf_topkast: truly sparse Top-KAST training for Hugging Face Transformers."""

from .checkpoints import CheckpointError, export_sparse, last_whole_checkpoint
from .config import TopKastConfig
from .report import sparsity_report
from .surgery import densify, sparsify
from .training import TopKastCallback, TopKastController, TopKastTrainer, TopKastTrainerMixin


__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "TopKastCallback",
    "TopKastConfig",
    "TopKastController",
    "TopKastTrainer",
    "TopKastTrainerMixin",
    "densify",
    "export_sparse",
    "last_whole_checkpoint",
    "sparsify",
    "sparsity_report",
]
