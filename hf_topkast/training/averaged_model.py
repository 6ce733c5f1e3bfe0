"""
A running average of a sparse model along its training (EMA, SWA), held in θ.

A slot of a sparse layer means another weight after each refresh, so the average has to follow the sets.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from ..layers import TopKastLayer
from ..storage import STRUCTURE, TRACKING, is_sharded
from ..surgery import sparse_layers
from .borrowed import give_back
from .engines import find_ddp


class TopKastAveragedModel(AveragedModel):
    """
    `torch.optim.swa_utils.AveragedModel` for models with sparse layers: `ema.update_parameters(model)` after a step.

    It holds the average of θ, at every position that the trained model stores, in the sets that it has: when those
    have changed since the last update, its layers get the same ones first, each weight keeping its own average. So it
    computes with the averaged weights on A, and costs the memory of one more sparse model; an update reads all of θ,
    as that of a dense model would. A model without sparse layers is averaged as ever.

    Args:
        model (`torch.nn.Module`): the model to average, wrapped by DDP or not.
        device, avg_fn, multi_avg_fn, use_buffers: as in torch. The functions work element by element, or they see the
            values of B and the reservoir as two tensors. Of the buffers of sparse layers only θ is ever averaged.

    Raises:
        ValueError: if FSDP2 has sharded the model.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        model = bare(model)
        super().__init__(model, *args, **kwargs)
        give_back(self.module, model)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """
        Takes the weights that `model` has now into the average.

        Raises:
            ValueError: if the model has other layers than the average, or FSDP2 has sharded it.
        """
        model = bare(model)
        pairs = list(layer_pairs(self.module, model))
        if not pairs:
            super().update_parameters(model)
            return
        for mine, live in pairs:
            if not same_sets(mine, live):
                masks = live.pattern.active_mask(), live.pattern.backward_mask()
                mine.reassign(*(mask.to(mine.values.device) for mask in masks))
            for name in TRACKING:
                getattr(mine, name).copy_(getattr(live, name))
            if live.input_norms is not None:
                mine.input_norms.copy_(live.input_norms)
        own = {id(tensor) for layer, _ in pairs for tensor in (layer.columns, *layer.buffers(recurse=False))}
        parameters, buffers = (
            [(mine, live) for mine, live in zip(*both, strict=True) if id(mine) not in own]
            for both in ([self.module.parameters(), model.parameters()], [self.module.buffers(), model.buffers()])
        )
        averaged = parameters + [(mine.reservoir, live.reservoir) for mine, live in pairs]
        if self.use_buffers:
            averaged += buffers
        else:
            for mine, live in buffers:
                mine.copy_(live)
        self._average([(mine.detach(), live.detach().to(mine.device)) for mine, live in averaged])
        for mine, live in zip(self.module.modules(), model.modules()):
            if "topkast" in mine.__dict__:
                mine.topkast.step = live.topkast.step
        self.n_averaged += 1

    def _average(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Changes the first of each pair; the two have one dtype and device."""
        if self.n_averaged == 0:
            for mine, live in pairs:
                mine.copy_(live)
        elif self.multi_avg_fn is None:
            average = self.avg_fn or get_swa_avg_fn()
            for mine, live in pairs:
                mine.copy_(average(mine, live, self.n_averaged.to(mine.device)))
        else:
            groups: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
            for mine, live in pairs:
                groups.setdefault((mine.device, mine.dtype), []).append((mine, live))
            for (device, _), group in groups.items():
                self.multi_avg_fn(*map(list, zip(*group)), self.n_averaged.to(device))  # type: ignore[call-arg]


def bare(model: nn.Module) -> nn.Module:
    """
    The model inside DDP and `torch.compile`.

    Raises:
        ValueError: if FSDP2 has sharded it.
    """
    ddp = find_ddp(model)
    model = model if ddp is None else ddp.module
    model = model._orig_mod if is_compiled_module(model) else model
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if sharded is not None:
        raise ValueError(
            f"FSDP2 has sharded '{sharded}', and averages are not taken of models in parts. Train under DDP, or save "
            "checkpoints and average those: average_models(from_pretrained(path) for path in paths)."
        )
    return model


def layer_pairs(model: nn.Module, other: nn.Module) -> Iterator[tuple[TopKastLayer, TopKastLayer]]:
    """
    The sparse layers of two models of one kind, side by side.

    Raises:
        ValueError: if the models have other layers; the message names one.
    """
    first, second = list(sparse_layers(model)), list(sparse_layers(other))
    outlines = [
        [(name, layer.matrix_shape, layer.block_size, layer.row_stride != 1) for name, layer in layers]
        for layers in (first, second)
    ]
    if outlines[0] != outlines[1]:
        odd = [*sorted(set(outlines[0]) ^ set(outlines[1]), key=str), *outlines[1]][0]
        raise ValueError(
            f"The average is of {len(first)} sparse layers and the model has {len(second)} or other ones: see layer "
            f"'{odd[0]}' of shape {odd[1]} (out, in), block size {odd[2]} and scatter_blocks={odd[3]}. Make a new "
            "average for it."
        )
    yield from ((mine, theirs) for (_, mine), (_, theirs) in zip(first, second))


def same_sets(layer: TopKastLayer, other: TopKastLayer) -> bool:
    """Whether two layers of one shape have the same A and B."""
    return all(torch.equal(getattr(layer, n), getattr(other, n).to(layer.values.device)) for n in STRUCTURE)
