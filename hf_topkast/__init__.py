"""hf_topkast: truly sparse Top-KAST training for Hugging Face Transformers."""

from .callback import TopKastCallback
from .config import TopKastConfig
from .controller import TopKastController
from .loading import export_sparse  # (makes from_pretrained and save_pretrained know sparse layers, too)
from .report import sparsity_report
from .state_file import CheckpointError
from .surgery import densify, sparsify
from .trainer import TopKastTrainer, TopKastTrainerMixin


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
    "sparsify",
    "sparsity_report",
]
