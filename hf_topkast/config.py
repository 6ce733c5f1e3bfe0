"""What a user may set: one validated dataclass, for `HfArgumentParser`, JSON and the state file alike."""

import copy
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .checks import GuardedSettings, check, check_regex, number, parsed, plain, whole
from .method import Method, get_method


QUANT_METHOD = "topkast"
# What fields are that were not given, where the method says nothing else.
DEFAULTS = {"refresh_every": 100, "penalty": 1e-4, "new_state": "zero", "new_state_warmup": 0}
SCHEDULE_DEFAULTS = {"density_schedule": "cubic", "schedule_begin": 0.0, "schedule_end": 0.5}
# What only some methods take: those that name a default for it.
EXCHANGE = ("drop_share", "drop_end", "drop_decay", "update_until")


@dataclass
class TopKastConfig(GuardedSettings, QuantizationConfigMixin):
    """
    Settings of Top-KAST training (Jayakumar et al., NeurIPS 2020), read by [`sparsify`] and [`TopKastController`].

    A model keeps a copy of its own, `model.topkast.config`, whose fields are checked when they are set, too. It
    derives from `QuantizationConfigMixin` so that `from_pretrained(..., quantization_config=config)` makes a dense
    checkpoint sparse; it stands in no `config.json`.

    Args:
        density (`float` or `str`, *optional*, defaults to 0.2):
            Share of the weights in the active set A, in (0, 1]. The paper's "80% forward sparsity" is 0.2.
            `"nonzero"`: in each layer as many as are not zero, for a model that was pruned before.
        backward_density (`float`, *optional*, defaults to `min(1, 2 * density)`):
            Share of the weights in B, the active and the exploration set together, in [density, 1]. With
            `density="nonzero"` a layer's B defaults to twice its A. Methods that do not explore have B = A.
        refresh_every (`int`, *optional*, defaults to 100, or what the method's authors took):
            Optimizer steps between two choices of A and B (the paper's N).
        explore_until (`int` or `float`, *optional*):
            Fraction of training (up to 1) or optimizer step (above 1) after which B becomes A. `None`: never.
        initial_density (`float`, *optional*):
            Density before the first step, from which it moves to `density`, that of B in proportion. `None`: no
            schedule.
        density_schedule (`str`, *optional*, defaults to `"cubic"`):
            How it moves: `"linear"`, `"cubic"` (fast at first, as in gradual magnitude pruning) or `"cosine"`.
        schedule_begin (`int` or `float`, *optional*, defaults to 0):
            Fraction of training (up to 1) or optimizer step (above 1) at which it begins to move.
        schedule_end (`int` or `float`, *optional*, defaults to 0.5):
            The same for the end. There is a refresh at that step, whatever `refresh_every` is.
        distribution (`str`, *optional*, defaults to `"uniform"`):
            How `density` is shared out: `"uniform"`, the same for every layer; `"erdos_renyi"`, in proportion to
            (out + in) / (out · in); `"global"`, the largest weights of all layers together.
        density_overrides (`dict[str, float]`, *optional*):
            Densities of single layers: a regular expression for a layer's whole name, and its density. The first
            match counts; `density` and `distribution` are for the layers that none names.
        split_fused (`bool`, *optional*, defaults to `False`):
            Whether the query, key and value rows of a fused projection, or its gate and up, get sets of their own.
        penalty (`float`, *optional*, defaults to 1e-4, with `method="dpf"` to 0):
            Coefficient λ of the exploration penalty λ/2·(Σ_A θ² + Σ_{B\\A} θ²/density) (the paper's §2.3).
        penalty_mode (`str`, *optional*, defaults to `"coupled"`):
            `"coupled"` adds the penalty's gradient to the loss's; `"decoupled"` shrinks the values as AdamW does.
        new_state (`str`, *optional*, defaults to `"zero"`, with `method="smet"` to `"fresh"`):
            Optimizer state of a weight that enters B. `"zero"`; `"mean"`, the layer's mean second moment; `"fresh"`,
            zero with a bias correction that counts from its own entry, for Adam and AdamW.
        new_state_warmup (`int`, *optional*, defaults to 0, with `method="smet"` to 100):
            With `new_state="fresh"`: steps over which the change of a weight that entered B rises to full.
        exploration_lr_scale (`float`, *optional*, defaults to 1.0):
            Factor on the optimizer's change of the values in B\\A. 1 is the paper.
        lr_scale (`float`, *optional*, defaults to 1.0):
            Factor on the learning rate of the sparse values alone; everything else has the optimizer's.
        powerprop_alpha (`float`, *optional*, defaults to 1.0):
            Trains θ·|θ|^(α−1) in the place of sparse weights, so that large ones learn faster (Powerpropagation,
            arXiv 2110.00296). 1: plain weights.
        method (`str`, *optional*, defaults to `"topkast"`):
            Rule that chooses A and B, a key of `hf_topkast.sets.METHODS`; docs/methods.md compares them.
        drop_share (`float`, *optional*, defaults to what the method's authors took):
            Share of A that a refresh exchanges at first. Only for methods that exchange a share.
        drop_end (`float`, *optional*, defaults to what the method's authors took):
            The share at `update_until`.
        drop_decay (`str`, *optional*, defaults to what the method's authors took):
            How the share goes from one to the other: `"constant"`, not at all; `"cosine"`; or `"staged"`, half of
            `drop_share` from 3/4 of the way on.
        update_until (`int` or `float`, *optional*, defaults to what the method's authors took):
            Fraction of training (up to 1) or optimizer step (above 1) of the last exchange.
        seed (`int`, *optional*, defaults to 0):
            Seed of random choices. They do not depend on torch's global generator.
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
        refresh_lag (`int`, *optional*, defaults to 0):
            So many steps before they change, A and B are chosen in a thread, from the weights of that moment, while
            training goes on. Less than `refresh_every`. 0, the paper: training waits for the choice.

    Raises:
        ValueError: if a field is out of range; the message names the field, the value and what is allowed.
    """

    # None is not allowed, but HfArgumentParser takes the second type of three, and a union of two for a number.
    density: float | str | None = field(
        default=0.2, metadata={"help": "Share of the weights in A, in (0, 1], or 'nonzero' for a pruned model."}
    )
    backward_density: float | None = field(
        default=None,
        metadata={"help": "Share of the weights in B ⊇ A. Default: min(1, 2 * density); that of A if static."},
    )
    refresh_every: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two choices of A and B. Default: 100, or the method's."},
    )
    explore_until: float | None = field(
        default=None,
        metadata={"help": "Fraction of training (<= 1) or step (> 1) after which B becomes A. Default: never."},
    )
    initial_density: float | None = field(
        default=None, metadata={"help": "Density before the first step. Default: no schedule, always `density`."}
    )
    density_schedule: str | None = field(
        default=None,
        metadata={
            "help": "How the density moves from `initial_density` to `density`. Default: cubic.",
            "choices": ["linear", "cubic", "cosine"],
        },
    )
    schedule_begin: float | None = field(
        default=None, metadata={"help": "Fraction of training (<= 1) or step (> 1) at which it begins. Default: 0."}
    )
    schedule_end: float | None = field(
        default=None, metadata={"help": "Fraction of training (<= 1) or step (> 1) at which it ends. Default: 0.5."}
    )
    distribution: str = field(
        default="uniform",
        metadata={
            "help": "How `density` is shared out among the layers.",
            "choices": ["uniform", "erdos_renyi", "global"],
        },
    )
    density_overrides: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Densities of single layers: a mapping, or JSON, of regex to density."}
    )
    split_fused: bool = field(
        default=False, metadata={"help": "Whether each part of a fused projection gets sets of its own."}
    )
    penalty: float | None = field(
        default=None, metadata={"help": "Coefficient of the exploration penalty, >= 0. Default: 1e-4; dpf: 0."}
    )
    penalty_mode: str = field(
        default="coupled",
        metadata={
            "help": "'coupled': in the gradient, like a loss term; 'decoupled': as AdamW's weight decay.",
            "choices": ["coupled", "decoupled"],
        },
    )
    new_state: str | None = field(
        default=None,
        metadata={
            "help": "Optimizer state of a weight that enters B. Default: zero, or the method's.",
            "choices": ["zero", "mean", "fresh"],
        },
    )
    new_state_warmup: int | None = field(
        default=None,
        metadata={"help": "Steps over which a newcomer's change rises to full, with new_state=fresh. Default: 0."},
    )
    exploration_lr_scale: float = field(
        default=1.0, metadata={"help": "Factor on the optimizer's change of the values in B\\A, >= 0. 1: the paper."}
    )
    lr_scale: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate of the sparse values alone, > 0."}
    )
    powerprop_alpha: float = field(
        default=1.0, metadata={"help": "Trains θ·|θ|^(alpha-1) in the place of sparse weights, >= 1. 1: plain."}
    )
    method: str = field(default="topkast", metadata={"help": "Rule that chooses A and B."})
    drop_share: float | None = field(
        default=None, metadata={"help": "Share of A that a refresh exchanges at first. Default: the method's."}
    )
    drop_end: float | None = field(
        default=None, metadata={"help": "Share of A that a refresh exchanges at the end. Default: the method's."}
    )
    drop_decay: str | None = field(
        default=None,
        metadata={
            "help": "How the exchanged share goes from drop_share to drop_end. Default: the method's.",
            "choices": ["constant", "cosine", "staged"],
        },
    )
    update_until: float | None = field(
        default=None,
        metadata={"help": "Fraction of training (<= 1) or step (> 1) of the last exchange. Default: the method's."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of random choices of A and B."})
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
    refresh_lag: int = field(
        default=0, metadata={"help": "Choose A and B so many steps ahead, while training goes on. 0: training waits."}
    )
    quant_method: str = field(default=QUANT_METHOD, init=False, repr=False)

    def __post_init__(self):
        for spec in fields(self):
            setattr(self, spec.name, plain(getattr(self, spec.name)))
        get_method(self.method)
        self._check_densities()
        for name, default in self._defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        allowed = "a whole number of optimizer steps, at least 1"
        check(whole(self.refresh_every) >= 1, "refresh_every", self.refresh_every, allowed)
        allowed = f"a whole number of optimizer steps, at least 0 and less than refresh_every={self.refresh_every}"
        check(0 <= whole(self.refresh_lag) < self.refresh_every, "refresh_lag", self.refresh_lag, allowed)
        self._check_moment("explore_until")
        self._check_schedule()
        self._check_overrides()
        for name in ("penalty", "exploration_lr_scale"):
            value = getattr(self, name)
            check(0 <= number(value) < math.inf, name, value, "a finite number, at least 0")
        check(0 < number(self.lr_scale) < math.inf, "lr_scale", self.lr_scale, "a finite number above 0")
        alpha = self.powerprop_alpha
        check(1 <= number(alpha) < math.inf, "powerprop_alpha", alpha, "a finite number, at least 1")
        check(whole(self.seed) >= 0, "seed", self.seed, "a whole number, at least 0")
        for spec in fields(self):
            choices = spec.metadata.get("choices")
            value = getattr(self, spec.name)
            if choices and (value is not None or spec.default is not None):
                check(value in choices, spec.name, value, "one of " + ", ".join(map(repr, choices)))
        self._check_new_state()
        self._check_method(self._method)
        self._check_block_size()
        for name in ("target_modules", "exclude_modules"):
            self._check_module_rule(name)
        check(isinstance(self.split_fused, bool), "split_fused", self.split_fused, "True or False")
        self.guard()

    def _check_densities(self):
        if isinstance(self.density, str) and self.density != "nonzero":
            self.density = parsed(self.density, float)  # from the command line
        if self.density == "nonzero":
            least = 0
            allowed = "'uniform' with density='nonzero': the zeros say how dense each layer is"
            check(self.distribution == "uniform", "distribution", self.distribution, allowed)
        else:
            check(0 < number(self.density) <= 1, "density", self.density, "a number in (0, 1], or 'nonzero'")
            least = self.density
            if self.backward_density is None:
                self.backward_density = self._default_backward()
        if self.backward_density is not None:
            allowed = f"a number in [density, 1] = [{least}, 1]: B contains A"
            check(least <= number(self.backward_density) <= 1, "backward_density", self.backward_density, allowed)

    def _check_moment(self, name: str):
        value = getattr(self, name)
        if value is not None:
            allowed = "a fraction of training in [0, 1], a step (a whole number above 1), or None"
            check(0 <= number(value) <= 1 or whole(value) > 1, name, value, allowed)

    def _check_new_state(self):
        steps = self.new_state_warmup
        check(whole(steps) >= 0, "new_state_warmup", steps, "a whole number of optimizer steps, at least 0")
        allowed = "left out unless new_state='fresh': only then a weight has an age"
        check(steps == 0 or self.new_state == "fresh", "new_state_warmup", steps, allowed)

    def _check_method(self, method: Method):
        """Whether the method takes what was given: a field that it would pass over is an error."""
        for name in EXCHANGE:
            value = getattr(self, name)
            allowed = f"left out with method={self.method!r}, which does not exchange a share of A"
            check(value is None or name in method.defaults, name, value, allowed)
        if self.drop_share is not None:
            check(0 <= number(self.drop_share) <= 1, "drop_share", self.drop_share, "a number in [0, 1]")
            allowed = f"a number in [0, drop_share] = [0, {self.drop_share}]"
            check(0 <= number(self.drop_end or 0) <= self.drop_share, "drop_end", self.drop_end, allowed)
            allowed = "'uniform' or 'erdos_renyi' with a method that exchanges weights: a layer keeps its size"
            check(self.distribution != "global", "distribution", self.distribution, allowed)
        self._check_moment("update_until")
        if not method.explores:
            for name, idle in (("explore_until", None), ("exploration_lr_scale", 1)):
                value = getattr(self, name)
                check(value == idle, name, value, f"left out with method={self.method!r}, whose B is A")
            allowed = f"left out, or equal to density, with method={self.method!r}, whose B is A"
            alike = self.density == "nonzero" and self.backward_density is None
            check(alike or self.backward_density == self.density, "backward_density", self.backward_density, allowed)
        if not method.keeps_values:
            allowed = f"'same' with method={self.method!r}, which stores nothing outside B"
            check(self.reservoir_device == "same", "reservoir_device", self.reservoir_device, allowed)
            allowed = (
                f"1 with method={self.method!r}, whose new weights are zero: there θ has no slope, and never moves"
            )
            check(self.powerprop_alpha == 1 or not method.grows, "powerprop_alpha", self.powerprop_alpha, allowed)
        if method.gradient is not None:
            allowed = f"0 with method={self.method!r}, which needs the gradients of the very step"
            check(self.refresh_lag == 0, "refresh_lag", self.refresh_lag, allowed)

    def _check_schedule(self):
        if self.initial_density is None:
            for name in SCHEDULE_DEFAULTS:
                value = getattr(self, name)
                check(value is None, name, value, "left out where initial_density is not given: no density changes")
            return
        check(0 < number(self.initial_density) <= 1, "initial_density", self.initial_density, "a number in (0, 1]")
        fixed = [("density='nonzero'", self.density == "nonzero")]
        fixed.append((f"method={self.method!r}", not self._method.refreshes))
        for setting, keeps_sizes in fixed:
            allowed = f"left out with {setting}: the sets keep their sizes"
            check(not keeps_sizes, "initial_density", self.initial_density, allowed)
        allowed = f"at least density={self.density} with method={self.method!r}: what is pruned stays out"
        falls = self._method.grows or self.initial_density >= self.density
        check(falls, "initial_density", self.initial_density, allowed)
        for name in ("schedule_begin", "schedule_end"):
            self._check_moment(name)
        if (self.schedule_begin > 1) == (self.schedule_end > 1):  # else only the number of steps can tell
            allowed = f"below schedule_end={self.schedule_end!r}"
            check(self.schedule_begin < self.schedule_end, "schedule_begin", self.schedule_begin, allowed)

    def _check_overrides(self):
        if isinstance(self.density_overrides, str):
            self.density_overrides = parsed(self.density_overrides, json.loads)
        overrides = self.density_overrides
        if overrides is None:
            return
        allowed = "a mapping of regular expressions to densities in (0, 1]"
        valid = isinstance(overrides, dict) and all(
            isinstance(key, str) and 0 < number(value) <= 1 for key, value in overrides.items()
        )
        check(valid, "density_overrides", overrides, allowed)
        for pattern in overrides:
            check_regex("density_overrides", pattern)
        allowed = "left out with density='nonzero': the zeros say how dense each layer is"
        check(self.density != "nonzero", "density_overrides", overrides, allowed)

    def _check_block_size(self):
        size = [1] if self.block_size is None else self.block_size
        size = list(size) if isinstance(size, list | tuple) else [size]
        valid = len(size) in (1, 2) and all(whole(side) >= 1 for side in size)
        allowed = "one or two whole numbers, at least 1: the rows and columns of a block"
        check(valid, "block_size", self.block_size, allowed)
        self.block_size = [int(size[0]), int(size[-1])]

    def _check_module_rule(self, name: str):
        rule = getattr(self, name)
        if isinstance(rule, str):
            check_regex(name, rule)
        elif rule is not None:
            names = isinstance(rule, list | tuple | set) and all(isinstance(entry, str) for entry in rule)
            check(names, name, rule, "a list of module names, one regular expression, or None")
            rule = sorted(rule) if isinstance(rule, set) else list(rule)
            # The command line gives lists only, so the one keyword arrives as a list of one.
            setattr(self, name, "all-linear" if rule == ["all-linear"] else rule)

    def derived(self) -> set[str]:
        """The fields that are what they would be if they had not been given."""
        defaults = {**self._defaults(), "backward_density": self._default_backward()}
        return {name for name, default in defaults.items() if getattr(self, name) == default}

    def _defaults(self) -> dict[str, Any]:
        """What fields are that were not given, as the method has it."""
        own = {name: value(self) if callable(value) else value for name, value in self._method.defaults.items()}
        scheduled = (self.initial_density or own.get("initial_density")) is not None
        return {**DEFAULTS, **(SCHEDULE_DEFAULTS if scheduled else {}), **own}

    @property
    def _method(self) -> Method:
        return get_method(self.method)

    def _default_backward(self) -> float | None:
        if self.density == "nonzero":
            return None
        return min(1.0, self._method.backward_ratio * self.density)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types, with `quant_method`, as the state file stores them."""
        return {spec.name: copy.deepcopy(getattr(self, spec.name)) for spec in fields(self)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """
        Builds the configuration from a dictionary, as [`TopKastConfig.to_dict`] gives it.

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
