"""
Parameter groups for the values of sparse layers: without the optimizer's own weight decay, for the exploration penalty
has its place, and with a learning rate of their own.
"""

from collections.abc import Iterable
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer


class OwnGroups:
    """
    Takes values out of an optimizer's weight decay, and scales their learning rate, while it makes a step.

    Its groups stay as their owner made them, for schedulers keep a learning rate and checkpoints an entry for each.
    For the step it gets others in their place, in which a group that has such values and others is cut in two.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        values (`Iterable[torch.nn.Parameter]`): what is not to decay.
        lr_scale (`float`, *optional*, defaults to 1.0): factor on their learning rate.
    """

    def __init__(self, optimizer: Optimizer, values: Iterable[nn.Parameter], lr_scale: float = 1.0):
        self._optimizer, self._values, self._lr_scale = optimizer, list(values), lr_scale
        self._own: list[dict] | None = None  # the owner's groups, while others stand in for them
        self._halves: list[tuple[dict, dict]] = []  # a group's parameters that decay, and those that do not
        # After an error in the midst of a step the owner's groups are what is to be saved.
        optimizer.register_state_dict_pre_hook(lambda _: self.end())

    def begin(self):
        """Before a step: the optimizer gets the groups for it."""
        self.end()  # of a step that an error has ended
        spared = {id(parameter) for parameter in self._values}
        own, found, groups = self._optimizer.param_groups, iter(self._halves), []
        halves = []
        for group in own:
            kept = [parameter for parameter in group["params"] if id(parameter) not in spared]
            alike = not group.get("weight_decay") and self._lr_scale == 1
            if len(kept) == len(group["params"]) or alike:
                groups.append(group)
                continue
            rest = [parameter for parameter in group["params"] if id(parameter) in spared]
            # The dictionaries of the last step, where there are: a compiled step would be compiled anew for others.
            pair = next(found, ({}, {}))
            for half, parameters in zip(pair, (kept, rest)):
                half.update(group)
                half["params"] = parameters
            if "weight_decay" in group:
                pair[1]["weight_decay"] = 0.0
            if self._lr_scale != 1:
                pair[1]["lr"] = group["lr"] * self._lr_scale
            if kept:  # what is counted up in place, as optimi counts steps, would be counted twice
                tensors = {key: value for key, value in pair[1].items() if isinstance(value, Tensor)}
                pair[1].update({key: value.clone() for key, value in tensors.items()})
            halves.append(pair)
            groups.append(pair[0] if kept else pair[1])
        self._halves = halves
        if halves:  # what was added stands last, so that the owner's places of groups hold
            added = [rest for kept, rest in halves if kept["params"]]
            self._own, self._optimizer.param_groups = own, groups + added

    def end(self):
        """After a step: the owner's groups come back, with what the optimizer has noted in them."""
        if self._own is None:
            return
        cut = [group for group in self._own if not any(group is other for other in self._optimizer.param_groups)]
        for group, pair in zip(cut, self._halves):
            noted = next(half for half in pair if half["params"])
            changed = {"params", "weight_decay"} | (set() if self._lr_scale == 1 else {"lr"})
            group.update({key: noted[key] for key in noted if key not in changed})
        self._optimizer.param_groups, self._own = self._own, None

    @contextmanager
    def given_back_on_error(self):
        """An error within it ends the step: a group that the owner adds then is not to go to those of the step."""
        try:
            yield
        except BaseException:
            self.end()
            raise
