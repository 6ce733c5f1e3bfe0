"""
What happens around an optimizer step: the penalty before it, a refresh of A and B after it, under `Trainer` or any
other loop, in one process or many.

It reads the steps and the optimizer, and changes layers only through what [`hf_topkast.storage`] offers.
"""

from .callback import TopKastCallback
from .controller import TopKastController
from .trainer import TopKastTrainer, TopKastTrainerMixin


__all__ = [
    "TopKastCallback",
    "TopKastController",
    "TopKastTrainer",
    "TopKastTrainerMixin",
]
