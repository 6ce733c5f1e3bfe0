"""What a method is, the rule that chooses A and B, and the table of those there are, by the config's `method`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Gradients(Protocol):
    """Gradients of the optimizer step that a refresh follows, of one layer or one part of it; never whole."""

    def largest(self, count: int, among: Tensor) -> Tensor:
        """
        The `count` places of largest magnitude among those marked in `among`, bool, (rows, columns), of the dense
        gradient dYᵀX, summed over all micro-batches and ranks; bool, (rows, columns). Ties go to the lower index.
        """

    def of_active(self) -> Tensor:
        """Magnitudes of the gradient that the optimizer was given, (rows, columns), zero outside A."""

    def seen(self) -> bool:
        """Whether anything came to these weights in that step: to an expert, it may be no token."""


class Late:
    """A field of a dataclass that may be given as a function without arguments, called when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return None  # what the field is by default
        given = instance.__dict__[self._name]
        if callable(given):
            given = instance.__dict__[self._name] = given()
        return given

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self._name] = value


@dataclass(frozen=True)
class LayerView:
    """
    What a method sees of one layer, or of one part of a fused layer. Where sets hold whole blocks, every place stands
    for a block: `theta` has their norms, and sizes count them.

    Attributes:
        theta (`torch.Tensor`): the weights, (rows, columns), finite; with `score="activation"` times the norms of
            their inputs; with `keeps_values=False` zero outside B.
        size (`int`): how many places A is to have.
        backward_size (`int`): how many places B is to have.
        active, backward (`torch.Tensor`, *optional*): A and B as they are, bool, (rows, columns). `None` at the first
            choice, when the layer is made sparse.
        drop (`float`): share of A to exchange now, see `drop_share`.
        by_row (`bool`): whether each row is ranked by itself, and has an equal share (`compare="row"`).
        pruned (`bool`): whether the zeros of the first weights say how large A is (`density="nonzero"`).
        generator (`torch.Generator`): for random choices, on the CPU; the same on every rank and after resuming,
            another one for every layer, part and step.
        gradients ([`Gradients`], *optional*): for methods that say that they need them; `None` at the first choice.
    """

    theta: Tensor
    size: int
    backward_size: int
    active: Tensor | None = Late()
    backward: Tensor | None = Late()
    drop: float = 0.0
    by_row: bool = False
    pruned: bool = False
    generator: torch.Generator = field(default_factory=torch.Generator)
    gradients: Gradients | None = None


@dataclass(frozen=True)
class Method:
    """
    A rule for A and B.

    Attributes:
        choose (`Callable`): gives A and B of a [`LayerView`], bool, (rows, columns), of the sizes it asks for, the
            first inside the second; or A alone, where B is A.
        refreshes (`bool`): whether the sets are chosen again during training.
        explores (`bool`): whether B may be larger than A.
        backward_ratio (`float`): `backward_density` over `density` where it is not given.
        keeps_values (`bool`): whether a weight outside B keeps its value, to enter with. If not nothing is stored for
            it, and it enters with zero.
        gradient (`str`, *optional*): which gradients a refresh needs: `"active"`, those of A, or `"dense"`, also
            those of weights outside B, for which a step that ends in a refresh keeps the inputs and the output
            gradients of each sparse layer.
        grows (`bool`): whether a weight outside A can come into it.
        ranks (`bool`): whether A is what ranks highest, so that `score` and `compare` say how.
        defaults (`Mapping`): fields of the configuration that it gives a default of its own, a value or a function of
            the configuration. Of `drop_share`, `drop_end`, `drop_decay` and `update_until` it takes those named here.
        needs (`str`): what it needs beyond |B| numbers, as the report says it.
        source (`str`): what it is, or what to cite, in Markdown, for model cards.
    """

    choose: Callable[[LayerView], Tensor | tuple[Tensor, Tensor]]
    refreshes: bool = True
    explores: bool = False
    backward_ratio: float = 1.0
    keeps_values: bool = True
    gradient: str | None = None
    grows: bool = True
    ranks: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    needs: str = "nothing"
    source: str = ""


# What only methods that exchange a share of A take: those that name a default for it.
EXCHANGE = ("drop_share", "drop_end", "drop_decay", "update_until")
# Fields that a method may give a default of its own.
DEFAULTED = (
    *("refresh_every", "penalty", "new_state", "new_state_warmup"),
    *("initial_density", "density_schedule", "schedule_begin", "schedule_end"),
    *EXCHANGE,
)

METHODS: dict[str, Method] = {}


def get_method(name: str) -> Method:
    """
    Looks up a method by the configuration's `method`.

    Raises:
        ValueError: if there is no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(
            f"method={name!r} is not allowed: it must be one of {sorted(METHODS)}. A method of your own has to be "
            "registered first, with hf_topkast.register_method."
        )
    return METHODS[name]


def register_method(name: str, choose: Callable[..., Any] | None = None, **properties: Any) -> Callable[..., Any]:
    """
    Makes a rule of your own a value of `method`; also a decorator, `@register_method("mine")`.

    Register it in every script that trains with it or loads what was trained with it, before the configuration is
    made. Registering a name again replaces what was said before.

    Args:
        name (`str`): its name, not that of a method of this package.
        choose (`Callable`): a function of a [`LayerView`], or an object that can be called like one; see [`Method`].
        properties: other attributes of [`Method`], such as `keeps_values=False` or
            `defaults={"drop_share": 0.1, "drop_decay": "cosine"}`; of the four fields that say what is exchanged, the
            others are then `drop_end=0`, `drop_decay="constant"`, `update_until=1.0`.

    Returns:
        `Callable`: `choose`.

    Raises:
        ValueError: if the name is one of this package's, `gradient` none of its values, or a default that of another
            field.
        TypeError: if `choose` cannot be called, or a property is not an attribute of [`Method`].
    """
    if choose is None:
        return lambda function: register_method(name, function, **properties)
    if name in METHODS and name not in _OWN:
        raise ValueError(f"register_method: {name!r} is a method of hf_topkast. Choose another name.")
    if not callable(choose):
        raise TypeError(f"register_method({name!r}) needs a function of a LayerView, got {choose!r}.")
    if properties.get("gradient") not in (None, "active", "dense"):
        raise ValueError(
            f"register_method({name!r}): gradient={properties['gradient']!r} is not allowed: it must be None, "
            "'active' or 'dense'."
        )
    odd = [field for field in properties.get("defaults", ()) if field not in DEFAULTED]
    if odd:
        raise ValueError(
            f"register_method({name!r}): defaults has {odd[0]!r}, and a method may give defaults of "
            f"{', '.join(DEFAULTED)} only."
        )
    defaults = dict(properties.pop("defaults", {}))
    if defaults.keys() & set(EXCHANGE):
        defaults = {"drop_share": 0.0, "drop_end": 0.0, "drop_decay": "constant", "update_until": 1.0, **defaults}
    METHODS[name] = Method(choose, defaults=defaults, **properties)
    _OWN.add(name)
    return choose


_OWN: set[str] = set()


def describe_method(name: str) -> str:
    """How model cards call a method: by its setting, and with what to cite."""
    source = get_method(name).source
    return f'`method="{name}"`' + (f" ({source})" if source else "")
