"""Keeps the optimizer's own weight decay off the values of sparse layers: the exploration penalty has its place."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer


class WithoutDecay:
    """
    Takes values out of an optimizer's weight decay while it makes a step.

    Its groups stay as their owner made them, for schedulers keep a learning rate and checkpoints an entry for each.
    For the step it gets others in their place, in which a decayed group with such values is cut in two.

    Args:
        optimizer (`torch.optim.Optimizer`): the unwrapped optimizer.
        values (`Iterable[torch.nn.Parameter]`): what is not to decay.
    """

    def __init__(self, optimizer: Optimizer, values: Iterable[nn.Parameter]):
        self._optimizer, self._values = optimizer, list(values)
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
            if len(kept) == len(group["params"]) or not group.get("weight_decay"):
                groups.append(group)
                continue
            rest = [parameter for parameter in group["params"] if id(parameter) in spared]
            # The dictionaries of the last step, where there are: a compiled step would be compiled anew for others.
            pair = next(found, ({}, {}))
            for half, parameters in zip(pair, (kept, rest)):
                half.update(group)
                half["params"] = parameters
            pair[1]["weight_decay"] = 0.0
            if kept:  # what is counted up in place, as optimi counts steps, would be counted twice
                pair[1].update({key: value.clone() for key, value in group.items() if isinstance(value, Tensor)})
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
            group.update({key: noted[key] for key in noted if key not in ("params", "weight_decay")})
        self._optimizer.param_groups, self._own = self._own, None
