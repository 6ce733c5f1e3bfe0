"""hf_topkast: truly sparse Top-KAST training for Hugging Face Transformers."""

from . import loading  # noqa: F401  (makes from_pretrained and save_pretrained know sparse layers)
from .checkpoint import CheckpointError
from .config import TopKastConfig
from .controller import TopKastController
from .report import sparsity_report
from .surgery import densify, sparsify
from .trainer import TopKastCallback, TopKastTrainer, TopKastTrainerMixin


__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "TopKastCallback",
    "TopKastConfig",
    "TopKastController",
    "TopKastTrainer",
    "TopKastTrainerMixin",
    "densify",
    "sparsify",
    "sparsity_report",
]
