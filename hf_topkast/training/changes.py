"""What is done to the values of sparse layers around an optimizer's update, beside the refresh."""

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import logging

from ..config import TopKastConfig
from ..layers import TopKastLayer
from ..storage import local, prefix_here
from . import powerprop
from .cold_start import correct_changes, note_start
from .penalty import add_penalty, shrink


logger = logging.get_logger(__name__)


class ValueChanges:
    """
    Penalty, reparameterisation and scaled changes, by the settings.

    Args:
        layers (`dict[str, TopKastLayer]`): the sparse layers, by name.
        config ([`TopKastConfig`]): the settings.
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
    """

    def __init__(self, layers: dict[str, TopKastLayer], config: TopKastConfig, optimizer: Optimizer):
        self.layers, self.config, self.optimizer = layers, config, optimizer
        self._alpha = config.powerprop_alpha
        self._before: dict[str, Tensor] = {}  # values of B\A, while their change is to be scaled
        self._told = False
        self._trained: list[str] = []  # layers whose values are φ now

    def begin(self, density: float, compare: bool = False):
        """
        Between the loss's gradients and the optimizer's update.

        Args:
            density (`float`): what the penalty of the exploration set is divided by.
            compare (`bool`, *optional*, defaults to `False`): whether to look how hard the penalty pulls, and to say
                so, once, if it is half as hard as the loss or more.

        Raises:
            ValueError: if the optimizer does not hold the values of a layer that has a gradient.
        """
        groups = self._groups()
        if compare and self.config.penalty_mode == "coupled" and not self._told:
            self._compare_penalty(density)
        trained = {name: layer for name, layer in self.layers.items() if layer.values.grad is not None}
        for name, layer in trained.items():
            if id(layer.values) not in groups:
                raise ValueError(
                    f"Layer '{name}' has a gradient, but the optimizer does not hold its values: it was unfrozen "
                    "after the optimizer was made. Make the optimizer and the controller anew."
                )
        for name, layer in trained.items():
            if self._alpha != 1:
                powerprop.to_trained(local(layer.values), self._alpha)
                self._trained.append(name)
            self._apply_penalty(layer, groups[id(layer.values)], density)
            if self.config.exploration_lr_scale != 1:
                self._before[name] = local(layer.values)[active_here(layer) :].clone()

    def end(self):
        """After the update, before the optimizer's groups are its owner's again."""
        if self.config.new_state == "fresh":
            groups = self._groups()
            for layer in self.layers.values():
                if layer.values.grad is not None:
                    state = self.optimizer.state.get(layer.values, {})
                    note_start(state, layer.values)
                    correct_changes(layer.values, state, groups[id(layer.values)], self.config.new_state_warmup)
        for name, before in self._before.items():
            layer = self.layers[name]
            exploration = local(layer.values)[active_here(layer) :]
            exploration.copy_(torch.lerp(before, exploration, self.config.exploration_lr_scale))
        self.settle()

    @torch.no_grad()
    def settle(self):
        """Makes all values weights again, also after a step that was skipped or ended by an error."""
        self._before.clear()
        for name in self._trained:
            powerprop.to_weights(local(self.layers[name].values), self._alpha)
        self._trained.clear()

    def _compare_penalty(self, density: float):
        """Of weights with a gradient on this rank, in root mean squares over B."""
        pull = loss = 0.0
        for layer in (layer for layer in self.layers.values() if layer.values.grad is not None):
            values, gradient = local(layer.values), local(layer.values.grad)
            change = torch.zeros_like(values)
            add_penalty(change, values, active_here(layer), density, self.config.penalty, None)
            pull += float(change.float().square().sum())
            loss += float(gradient.float().square().sum())
        if getattr(self.optimizer, "grad_scale", None) is None and pull > loss / 4 > 0:
            self._told = True
            logger.warning(
                f"The exploration penalty (penalty={self.config.penalty}) pulls at the sparse values with "
                f"{(pull / loss) ** 0.5:.1f} times the force of the loss's gradient (root mean squares), always "
                "towards zero. For pretrained weights, set penalty=0 or less than it is."
            )

    def _groups(self) -> dict[int, dict]:
        return {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}

    def _apply_penalty(self, layer: TopKastLayer, group: dict, density: float):
        if self.config.penalty == 0:
            return
        place, penalty = (active_here(layer), density), self.config.penalty
        if self.config.penalty_mode == "decoupled":
            shrink(local(layer.values), *place, group["lr"] * penalty)
        else:  # a fused optimizer under a gradient scaler unscales inside its step: scale the penalty alike
            scale = getattr(self.optimizer, "grad_scale", None)
            strength = -penalty if group.get("maximize") else penalty  # a cost, where the loss is to grow
            add_penalty(local(layer.values.grad), local(layer.values), *place, strength, scale)


def active_here(layer: TopKastLayer) -> int:
    """How many of the values that this rank holds belong to A: they come first."""
    return prefix_here(layer.active_count, layer.values)
