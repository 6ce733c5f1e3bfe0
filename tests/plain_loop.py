"""A plain training loop with the controller, optimizers for it, and the same training simulated with masks."""

import copy

import torch
from masked_reference import MaskedTraining
from toy_models import loss_of, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.surgery import sparse_layers


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.3, momentum=0.9)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=False, foreach=False)


def adamw_fused(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)


def adam(groups):
    return torch.optim.Adam(groups, lr=1e-2, amsgrad=True)


def rmsprop(groups):
    return torch.optim.RMSprop(groups, lr=1e-3)


def adagrad(groups):
    return torch.optim.Adagrad(groups, lr=1e-2)


def adafactor(groups):
    return torch.optim.Adafactor(groups, lr=1e-2)


def train(model, config, make_optimizer, micro_batches, total_steps=None):
    """Losses of a plain loop over lists of micro-batches, with the controller at the end."""
    optimizer = make_optimizer(model.parameters())
    controller = TopKastController(model, optimizer, total_steps=total_steps)
    losses = []
    for batches in micro_batches:
        optimizer.zero_grad()
        parts = [loss_of(model, tokens) / len(batches) for tokens in batches]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    return losses, controller


def compare_with_simulation(
    make_model, config, make_optimizer, steps=10, accumulation=1, dtype=torch.float64, parts=None
):
    dense = make_model(dtype=dtype)
    model = sparsify(copy.deepcopy(dense), config)
    names = [name for name, _ in sparse_layers(model)]
    simulation = MaskedTraining(dense, names, config, make_optimizer, parts)
    batches = token_batches(steps * accumulation)
    micro_batches = [batches[step * accumulation : (step + 1) * accumulation] for step in range(steps)]
    expected = [simulation.step(batch) for batch in micro_batches]
    losses, controller = train(model, config, make_optimizer, micro_batches)
    assert controller.step == steps
    return model, simulation, losses, expected
