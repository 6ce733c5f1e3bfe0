"""
Notices optimizers that train sparse values without a controller: nothing would be refreshed or penalised.
"""

import weakref

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.utils import logging

from ..storage import LIVING


logger = logging.get_logger(__name__)

# Controllers at work. They have the optimizers alive that they hook, and these them.
_watched: "weakref.WeakSet" = weakref.WeakSet()
# Optimizers that need no second look, with the number of parameters that they had at the first.
_seen: "weakref.WeakKeyDictionary[Optimizer, int]" = weakref.WeakKeyDictionary()


def watch(controller):
    """From now on another optimizer that steps the same layers is an error."""
    _watched.add(controller)


def unwatch(controller):
    """Takes back [`watch`]."""
    _watched.discard(controller)


def controller_of(optimizer: Optimizer):
    """The [`TopKastController`] at work on an optimizer, or `None`."""
    return next((controller for controller in _watched if controller.optimizer is optimizer), None)


def _on_any_step(optimizer: Optimizer, args: tuple, kwargs: dict):
    if torch.compiler.is_compiling() or controller_of(optimizer) is not None:
        return
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    count = len(trained)
    if _seen.get(optimizer) == count:
        return
    parameters = {id(parameter) for parameter in trained}
    for controller in list(_watched):
        for name, layer in controller.layers.items():
            if id(layer.values) in parameters:
                raise ValueError(
                    f"This {type(optimizer).__name__} steps the values of layer '{name}', whose TopKastController "
                    "works with another optimizer, so that A and B would never change again. Call remove() on that "
                    "controller, and make a new TopKastController(model, optimizer) after the new optimizer."
                )
    _seen[optimizer] = count
    if any(id(layer.values) in parameters for layer in LIVING):
        logger.warning(
            f"This {type(optimizer).__name__} steps the values of sparse layers without a TopKastController: A and B "
            "stay as they are, there is no exploration penalty, and the optimizer's own weight decay is applied. Use "
            "TopKastTrainer, add TopKastCallback() to a Trainer, or make a TopKastController(model, optimizer)."
        )


register_optimizer_step_pre_hook(_on_any_step)
