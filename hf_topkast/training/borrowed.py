"""
Copies of a model that compute with the weights of another.

Trainers of TRL, for one, give a model a `forward` of its own, a function that holds the model's former one.
`copy.deepcopy` copies no function, so that the copy's runs the model that it was copied from.
"""

from collections.abc import Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def borrowers(model: nn.Module, lender: nn.Module) -> list[str]:
    """The names of a model's modules whose own `forward`, noted on the module, runs one of the lender's modules."""
    lent = {id(module) for module in lender.modules()}
    own = [(name, vars(module)["forward"]) for name, module in model.named_modules() if "forward" in vars(module)]
    return [name for name, forward in own if any(id(each) in lent for each in _modules_in(forward))]


def give_back(model: nn.Module, lender: nn.Module) -> None:
    """Leaves the modules of a copy that run modules of the model it was copied from with their class's `forward`."""
    for name in borrowers(model, lender):
        del model.get_submodule(name).forward


def _modules_in(forward: Any) -> Iterator[nn.Module]:
    """The modules that a function holds, itself or by functions that it calls."""
    seen: set[int] = set()
    held = [forward]
    while held:
        each = held.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            yield each
        elif isinstance(each, MethodType):
            held += [each.__self__, each.__func__]
        elif isinstance(each, partial):
            held += [each.func, *each.args, *each.keywords.values(), *vars(each).values()]
        elif isinstance(each, FunctionType):
            held += [*vars(each).values(), *map(_contents, each.__closure__ or ())]
            held += [*(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values()]
        elif isinstance(each, list | tuple):
            held += each
        elif isinstance(each, dict):
            held += each.values()
        elif callable(each) and not isinstance(each, type):  # an object that calls what it has noted
            held += getattr(each, "__dict__", {}).values()


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that its function never came to give a value
        return None
