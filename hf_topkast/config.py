"""What a user may set: one validated dataclass, for `HfArgumentParser`, JSON and `config.json` alike."""

import copy
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin


QUANT_METHOD = "topkast"


@dataclass
class TopKastConfig(QuantizationConfigMixin):
    """
    Settings of Top-KAST training (Jayakumar et al., NeurIPS 2020), read by [`sparsify`] and [`TopKastController`].

    It derives from `QuantizationConfigMixin` because `config.json` of a saved sparse model carries it under
    `quantization_config`: that is how `from_pretrained` learns that a checkpoint holds sparse layers.

    Args:
        density (`float`, *optional*, defaults to 0.2):
            Share of each layer's weights in the active set A, in (0, 1]. The paper's "80% forward sparsity" is 0.2.
        backward_density (`float`, *optional*, defaults to `min(1, 2 * density)`):
            Share of each layer's weights in B, the active and the exploration set together, in [density, 1].
        refresh_every (`int`, *optional*, defaults to 100):
            Optimizer steps between two choices of A and B (the paper's N).
        explore_until (`int` or `float`, *optional*):
            Fraction of training (up to 1) or optimizer step (above 1) after which B becomes A. `None`: never.
        penalty (`float`, *optional*, defaults to 1e-4):
            Coefficient λ of the exploration penalty λ/2·(Σ_A θ² + Σ_{B\\A} θ²/density) (the paper's §2.3).
        penalty_mode (`str`, *optional*, defaults to `"coupled"`):
            `"coupled"` adds the penalty's gradient to the loss's; `"decoupled"` shrinks the values as AdamW does.
        new_state (`str`, *optional*, defaults to `"zero"`):
            Second moment of a weight that enters B: `"zero"`, or `"mean"`, the layer's mean.
        exploration_lr_scale (`float`, *optional*, defaults to 1.0):
            Factor on the optimizer's change of the values in B\\A. 1 is the paper.
        method (`str`, *optional*, defaults to `"topkast"`):
            Rule that chooses A and B, a key of `hf_topkast.methods.METHODS`.
        block_size (`int` or `tuple[int, int]`, *optional*, defaults to `(1, 1)`):
            Rows (out) and columns (in) of the blocks that the sets hold as a whole, ranked by their L2 norm; one
            number for squares. They must divide every sparse layer's shape. Densities count blocks then.
        target_modules (`list[str]` or `str`, *optional*):
            Names of the layers to make sparse: a list of suffixes, one regular expression for the whole name, or
            `"all-linear"`. `None`: every attention and MLP projection inside the decoder blocks.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names of layers that stay dense, by the same rules.
        reservoir_device (`str`, *optional*, defaults to `"same"`):
            Where the weights outside B rest: `"same"`, beside the layer; `"cpu"`, in host memory; `"disk"`, in a
            memory-mapped temporary file. Only refresh touches them.
        backend (`str`, *optional*, defaults to `"auto"`):
            Which implementation of the masked products runs, a key of `hf_topkast.ops.BACKENDS`, or `"auto"`.

    Raises:
        ValueError: if a field is out of range; the message names the field, the value and what is allowed.
    """

    density: float = field(default=0.2, metadata={"help": "Share of each layer's weights in A, in (0, 1]."})
    backward_density: float | None = field(
        default=None, metadata={"help": "Share of each layer's weights in B ⊇ A. Default: min(1, 2 * density)."}
    )
    refresh_every: int = field(default=100, metadata={"help": "Optimizer steps between two choices of A and B."})
    explore_until: float | None = field(
        default=None,
        metadata={"help": "Fraction of training (<= 1) or step (> 1) after which B becomes A. Default: never."},
    )
    penalty: float = field(default=1e-4, metadata={"help": "Coefficient of the exploration penalty, >= 0."})
    penalty_mode: str = field(
        default="coupled",
        metadata={
            "help": "'coupled': in the gradient, like a loss term; 'decoupled': as AdamW's weight decay.",
            "choices": ["coupled", "decoupled"],
        },
    )
    new_state: str = field(
        default="zero",
        metadata={"help": "Second moment of a weight that enters B.", "choices": ["zero", "mean"]},
    )
    exploration_lr_scale: float = field(
        default=1.0, metadata={"help": "Factor on the optimizer's change of the values in B\\A, >= 0. 1: the paper."}
    )
    method: str = field(default="topkast", metadata={"help": "Rule that chooses A and B."})
    block_size: list[int] | None = field(
        default=None,
        metadata={"help": "Rows and columns of the blocks that the sets hold; one number: squares. Default: 1 1."},
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers to make sparse: suffixes, one regex, or 'all-linear'. Default: the projections."},
    )
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that stay dense: suffixes or one regex."}
    )
    reservoir_device: str = field(
        default="same", metadata={"help": "Where the weights outside B rest.", "choices": ["same", "cpu", "disk"]}
    )
    backend: str = field(
        default="auto", metadata={"help": "Implementation of the masked products; 'auto' picks the fastest usable."}
    )
    quant_method: str = field(default=QUANT_METHOD, init=False, repr=False)

    def __post_init__(self):
        _check(0 < _number(self.density) <= 1, "density", self.density, "a number in (0, 1]")
        if self.backward_density is None:
            self.backward_density = min(1.0, 2 * self.density)
        allowed = f"a number in [density, 1] = [{self.density}, 1]: B contains A"
        backward = _number(self.backward_density)
        _check(self.density <= backward <= 1, "backward_density", self.backward_density, allowed)
        allowed = "a whole number of optimizer steps, at least 1"
        _check(_whole(self.refresh_every) >= 1, "refresh_every", self.refresh_every, allowed)
        if self.explore_until is not None:
            until = _number(self.explore_until)
            allowed = "a fraction of training in [0, 1], a step (a whole number above 1), or None"
            _check(0 <= until <= 1 or _whole(until) > 1, "explore_until", self.explore_until, allowed)
        for name in ("penalty", "exploration_lr_scale"):
            value = getattr(self, name)
            _check(0 <= _number(value) < math.inf, name, value, "a finite number, at least 0")
        for spec in fields(self):
            choices = spec.metadata.get("choices")
            if choices:
                value = getattr(self, spec.name)
                _check(value in choices, spec.name, value, "one of " + ", ".join(map(repr, choices)))
        self._check_block_size()
        for name in ("target_modules", "exclude_modules"):
            self._check_module_rule(name)

    def _check_block_size(self):
        size = [1] if self.block_size is None else self.block_size
        size = list(size) if isinstance(size, list | tuple) else [size]
        valid = len(size) in (1, 2) and all(_whole(side) >= 1 for side in size)
        allowed = "one or two whole numbers, at least 1: the rows and columns of a block"
        _check(valid, "block_size", self.block_size, allowed)
        self.block_size = [int(size[0]), int(size[-1])]

    def _check_module_rule(self, name: str):
        rule = getattr(self, name)
        if isinstance(rule, str):
            try:
                re.compile(rule)
            except re.error as error:
                raise ValueError(
                    f"{name}={rule!r} is not a regular expression ({error}); a list of names is matched by suffix."
                ) from error
        elif rule is not None:
            names = isinstance(rule, list | tuple | set) and all(isinstance(entry, str) for entry in rule)
            _check(names, name, rule, "a list of module names, one regular expression, or None")
            rule = list(rule)
            # The command line gives lists only, so the one keyword arrives as a list of one.
            setattr(self, name, "all-linear" if rule == ["all-linear"] else rule)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types, with `quant_method`, as `config.json` stores them."""
        return {spec.name: copy.deepcopy(getattr(self, spec.name)) for spec in fields(self)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """
        Builds the configuration from a dictionary, as `from_pretrained` does from `config.json`.

        Raises:
            ValueError: if a key is not a field, so that a setting of a newer version is never dropped silently.
        """
        settings = {key: value for key, value in config_dict.items() if key != "quant_method"}
        known = {spec.name for spec in fields(cls) if spec.init}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(
                f"TopKastConfig has no field {', '.join(map(repr, unknown))}; the fields are {sorted(known)}. "
                "A checkpoint of a newer hf_topkast needs that version to load."
            )
        settings.update({key: kwargs.pop(key) for key in list(kwargs) if key in known})
        config = cls(**settings)
        return (config, kwargs) if return_unused_kwargs else config


def _number(value: Any) -> float:
    """The value if it is a number, else NaN, which no range contains."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _whole(value: Any) -> float:
    """The value if it is a finite whole number, else NaN."""
    number = _number(value)
    return number if math.isfinite(number) and number == int(number) else math.nan


def _check(valid: bool, name: str, value: Any, allowed: str):
    if not valid:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}.")
