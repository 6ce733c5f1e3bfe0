"""
What people write, for `make types`: checked as strictly as their own code may be, and never run.

Calls of what has no annotations are errors in it, and so are results that are not of the type they are said to be.
"""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from typing_extensions import assert_type

from hf_topkast import (
    CheckpointError,
    LayerView,
    TopKastAveragedModel,
    TopKastCallback,
    TopKastConfig,
    TopKastController,
    TopKastDistillationConfig,
    TopKastDistillationMixin,
    TopKastDistillationTrainer,
    TopKastEMACallback,
    TopKastLayerLogger,
    TopKastTrainer,
    TopKastTrainerMixin,
    average_models,
    densify,
    export_sparse,
    last_whole_checkpoint,
    register_method,
    register_optimizer,
    sparsify,
    sparsity_report,
)


class Network(nn.Module):
    pass


@register_method("by_chance", keeps_values=False)
def by_chance(view: LayerView) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.rand_like(view.theta) < view.size / view.theta.numel()
    return chosen, chosen


def settings() -> TopKastConfig:
    config = TopKastConfig(density=0.2, block_size=[16, 16])
    assert_type(config.to_dict(), dict[str, Any])
    assert_type(TopKastConfig.from_dict({"density": 0.1}), TopKastConfig)
    assert_type(TopKastConfig.from_dict({}, return_unused_kwargs=True, a=1), tuple[TopKastConfig, dict[str, Any]])
    return config


def a_loop_of_ones_own(network: Network) -> None:
    assert_type(sparsify(network, settings()), Network)
    optimizer = torch.optim.AdamW(network.parameters())
    register_optimizer(torch.optim.AdamW, fresh={"exp_avg": 0.0})
    controller = TopKastController(network, optimizer)
    average = TopKastAveragedModel(network)
    optimizer.step()
    average.update_parameters(network)
    assert_type(controller.step, int)
    assert_type(controller.metrics(), dict[str, float])
    controller.load_state_dict(controller.state_dict())
    controller.refresh()
    controller.end_exploration()
    controller.remove()
    average_models([network, network])
    assert_type(sparsity_report(network).density, float)
    print(sparsity_report(network).to_dict())
    assert_type(densify(network), Network)


class SparseTrainer(TopKastTrainerMixin, Trainer):
    pass


class StudentTrainer(TopKastDistillationMixin, Trainer):
    pass


def with_a_trainer(model: Any, teacher: Any, arguments: TrainingArguments) -> None:
    callbacks = [TopKastEMACallback(decay=0.99), TopKastLayerLogger(every=100)]
    trainer = TopKastTrainer(model=model, args=arguments, callbacks=callbacks)
    try:
        trainer.train(resume_from_checkpoint=last_whole_checkpoint("runs"))
    except CheckpointError as error:
        print(error)
    assert_type(trainer.topkast_controller, TopKastController | None)
    weights = TopKastDistillationConfig(hidden_weight=0.5)
    TopKastDistillationTrainer(model=model, args=arguments, teacher=teacher, distillation=weights).train()
    SparseTrainer(model=model, args=arguments, callbacks=[TopKastCallback()]).train()
    StudentTrainer(model=model, args=arguments, teacher=teacher).train()
    export_sparse(model, "small")
