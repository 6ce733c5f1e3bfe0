"""What a refresh needs of the passes of the step before it: gradients of weights that have none, sizes of inputs."""

from functools import partial
from typing import Any

import torch.distributed as dist

from ..config import TopKastConfig
from ..layers import TopKastLayer
from ..method import get_method
from ..storage import local, raise_together
from .gradients import GradientWatch, PartGradients


# Share of the old mean squares of inputs that a refresh keeps (`score="activation"`).
KEPT_SQUARES = 0.9


class StepObserver:
    """
    Has layers keep what a refresh is going to need, in the steps that end in one.

    Args:
        layers (`dict[str, TopKastLayer]`): the sparse layers, by name. Frozen ones are left alone.
        config ([`TopKastConfig`]): the settings.
        group (`ProcessGroup`, *optional*): the ranks that train the model. `None`: all.

    Attributes:
        unseen (`set[str]`): layers that the step has given none of the gradients that the method needs: the model left
            them out, and they keep their sets.
    """

    def __init__(self, layers: dict[str, TopKastLayer], config: TopKastConfig, group: dist.ProcessGroup | None):
        self.layers, self.config, self._group = layers, config, group
        self._gradient = get_method(config.method).gradient
        watched = layers if self._gradient == "dense" else {}
        self._watches = {name: GradientWatch(layer, group) for name, layer in watched.items()}
        scored = {name: layer for name, layer in layers.items() if layer.input_norms is not None}
        self._inputs = {name: layer.new_input_watch() for name, layer in scored.items()}
        self.unseen: set[str] = set()

    def expect(self, refresh: bool):
        """Before the passes of a step: whether it ends in a refresh. What an earlier step has left is forgotten."""
        for name, squares in self._inputs.items():
            squares.forget()
            self.layers[name].input_watch = squares if refresh and self._trains(name) else None
        for name, watch in self._watches.items():
            watch.forget()
            self.layers[name].gradient_watch = watch if refresh and self._trains(name) else None

    def check(self, step: int):
        """
        Before a refresh changes anything: which layers have the gradients that the method needs. Every rank has to
        call.

        Raises:
            ValueError: if none has, or if one has a gradient and no pass forward; the message names the layer.
        """
        if self._gradient is None:
            return
        moving = [name for name in self.layers if self._trains(name)]
        if self._gradient == "active":
            self.unseen = {name for name in moving if self.layers[name].values.grad is None}
            strange = set()
        else:
            self.unseen = {name for name in moving if not self._watches[name].passes()}
            strange = {name for name in self.unseen if self._has_gradient(name)}
        problem = None
        if strange or (moving and len(self.unseen) == len(moving)):
            names = strange or self.unseen
            problem = ValueError(
                f"method={self.config.method!r} needs the gradients of step {step}, and layer '{min(names)}' has none "
                f"({len(names)} such layers): no backward pass went through its forward since the last step. If the "
                "model multiplies by its weight itself, name it in exclude_modules; or use a method that needs no "
                "gradient (topkast, set)."
            )
        raise_together(problem, self._group)

    def gradients_of(self, name: str) -> Any:
        """The gradients of a layer's parts, by their rows, where the method needs them."""
        if self._gradient is None:
            return None
        return partial(PartGradients, self.layers[name], self._watches.get(name))

    def follow_inputs(self):
        """Takes the inputs of the step into the running mean squares that weights are scored with."""
        for name, squares in self._inputs.items():
            norms = self.layers[name].input_norms
            squares.over_ranks(norms, self._group)
            if squares.tokens and bool(squares.mean().isfinite().all()):  # else they would stay infinite for ever
                norms.copy_(squares.follow(norms, KEPT_SQUARES))

    def _trains(self, name: str) -> bool:
        return self.layers[name].values.requires_grad

    def _has_gradient(self, name: str) -> bool:
        gradient = self.layers[name].values.grad
        return gradient is not None and bool(local(gradient).any())
