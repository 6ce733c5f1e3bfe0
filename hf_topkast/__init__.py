"""hf_topkast: truly sparse Top-KAST training for Hugging Face Transformers."""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING


# The command line answers most questions without torch, at once: there each name is imported when it is asked for.
COMMAND_LINE = PurePath((sys.argv or [""])[0]).stem == "hf-topkast" or sys.orig_argv[1:3] == ["-m", __name__]

if TYPE_CHECKING or not COMMAND_LINE:
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
        TopKastLayerLogger,
        TopKastTrainer,
        TopKastTrainerMixin,
        average_models,
        register_optimizer,
    )


__version__ = "0.2.0"

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
    "TopKastLayerLogger",
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


if not TYPE_CHECKING:  # for those who check types every name would be there

    def __getattr__(name: str):
        if name in __all__:
            for room in ("training", "checkpoints", "surgery", "config", "method", "report"):
                module = import_module(f".{room}", __name__)
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
