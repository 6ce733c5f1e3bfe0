"""hf_topkast: truly sparse Top-KAST training for Hugging Face Transformers."""

from .checkpoints import CheckpointError, export_sparse, last_whole_checkpoint
from .config import TopKastConfig
from .method import LayerView, register_method
from .report import sparsity_report
from .surgery import densify, sparsify
from .training import (
    TopKastAveragedModel,
    TopKastCallback,
    TopKastController,
    TopKastDistillationConfig,
    TopKastDistillationMixin,
    TopKastDistillationTrainer,
    TopKastEMACallback,
    TopKastTrainer,
    TopKastTrainerMixin,
    average_models,
    register_optimizer,
)


__version__ = "0.2.0.dev0"

__all__ = [
    "CheckpointError",
    "LayerView",
    "TopKastAveragedModel",
    "TopKastCallback",
    "TopKastConfig",
    "TopKastController",
    "TopKastDistillationConfig",
    "TopKastDistillationMixin",
    "TopKastDistillationTrainer",
    "TopKastEMACallback",
    "TopKastTrainer",
    "TopKastTrainerMixin",
    "average_models",
    "densify",
    "export_sparse",
    "last_whole_checkpoint",
    "register_method",
    "register_optimizer",
    "sparsify",
    "sparsity_report",
]
