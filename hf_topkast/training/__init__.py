"""
What happens around an optimizer step: the penalty before it, a refresh of A and B after it, under `Trainer` or any
other loop, in one process or many.

It reads the steps and the optimizer, and changes layers only through what [`hf_topkast.storage`] offers.
"""

from .averaged_model import TopKastAveragedModel
from .averages import average_models
from .callback import TopKastCallback
from .controller import TopKastController
from .distillation import TopKastDistillationMixin, TopKastDistillationTrainer
from .distillation_loss import TopKastDistillationConfig
from .ema import TopKastEMACallback
from .layer_logger import TopKastLayerLogger
from .optimizer_states import register_optimizer
from .trainer import TopKastTrainer, TopKastTrainerMixin


__all__ = [
    "TopKastAveragedModel",
    "TopKastCallback",
    "TopKastController",
    "TopKastDistillationConfig",
    "TopKastDistillationMixin",
    "TopKastDistillationTrainer",
    "TopKastEMACallback",
    "TopKastLayerLogger",
    "TopKastTrainer",
    "TopKastTrainerMixin",
    "average_models",
    "register_optimizer",
]
