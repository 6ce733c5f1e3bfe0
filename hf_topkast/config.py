"""What a user may set: one validated dataclass, for `HfArgumentParser`, JSON and the state file alike."""

import copy
from dataclasses import dataclass, field, fields
from typing import Any, Literal, overload

from transformers.utils.quantization_config import QuantizationConfigMixin

from .checks import GuardedSettings, plain
from .config_checks import SCHEDULE, check_density, check_fields
from .method import get_method
from .presets import Presets


QUANT_METHOD = "topkast"
# What fields are that were not given, where the method says nothing else.
DEFAULTS = {
    "refresh_every": 100,
    "penalty": 1e-4,
    "new_state": "zero",
    "new_state_warmup": 0,
    "score": "magnitude",
}
SCHEDULE_DEFAULTS = dict(zip(SCHEDULE, ("cubic", 0.0, 0.5)))


@dataclass
class TopKastConfig(Presets, GuardedSettings, QuantizationConfigMixin):
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
        score (`str`, *optional*, defaults to `"magnitude"`, with calibration to `"activation"`):
            What ranks weights: `"magnitude"`, |θ|; or `"activation"`, |θ| times the root mean square of the weight's
            input (Wanda, arXiv 2306.11695), measured by `sparsify(..., calibration=batches)` and then in training.
        compare (`str`, *optional*, defaults to `"layer"`, with `score="activation"` to `"row"`):
            Whether the weights of a layer are ranked together, or each row (output) by itself, with equal shares.
        block_size (`int` or `tuple[int, int]`, *optional*, defaults to `(1, 1)`):
            Rows (out) and columns (in) of the blocks that the sets hold as a whole, ranked by their L2 norm; one
            number for squares. They must divide every sparse layer's shape. Densities count blocks then.
        scatter_blocks (`bool`, *optional*, defaults to `False`):
            Whether the rows of a block lie far apart in the layer, and not side by side. It spares blocks much of
            what they cost in quality, and takes a reordering of the outputs of each product.
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
    score: str | None = field(
        default=None,
        metadata={
            "help": "What ranks weights: their magnitude, or also that of their inputs. Default: magnitude.",
            "choices": ["magnitude", "activation"],
        },
    )
    compare: str | None = field(
        default=None,
        metadata={
            "help": "Whether a layer's weights are ranked together or row by row. Default: layer; by activation: row.",
            "choices": ["layer", "row"],
        },
    )
    block_size: list[int] | None = field(
        default=None,
        metadata={"help": "Rows and columns of the blocks that the sets hold; one number: squares. Default: 1 1."},
    )
    scatter_blocks: bool = field(
        default=False, metadata={"help": "Whether the rows of a block lie far apart in the layer."}
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

    def __post_init__(self) -> None:
        for spec in fields(self):
            setattr(self, spec.name, plain(getattr(self, spec.name)))
        check_density(self)
        # Without a score it says how scores are to be compared that a calibration brings along, be it as by default.
        self._compare_given = self.score is None and self.compare is not None
        if self.backward_density is None:
            self.backward_density = self._default_backward()
        for name, default in self._defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        check_fields(self)
        self.guard()

    def derived(self) -> set[str]:
        """The fields that are what they would be if they had not been given."""
        defaults = {**self._defaults(), "backward_density": self._default_backward()}
        same = {name for name, default in defaults.items() if getattr(self, name) == default}
        return same - {"compare"} if self._compare_given else same

    def _defaults(self) -> dict[str, Any]:
        """What fields are that were not given, as the method has it."""
        method = get_method(self.method)
        own = {name: value(self) if callable(value) else value for name, value in method.defaults.items()}
        scheduled = (self.initial_density or own.get("initial_density")) is not None
        by_row = self.score == "activation" and self.density != "nonzero"
        compare = {"compare": "row" if by_row else "layer"}
        return {**DEFAULTS, **compare, **(SCHEDULE_DEFAULTS if scheduled else {}), **own}

    def _default_backward(self) -> float | None:
        if self.density == "nonzero":
            return None
        return min(1.0, get_method(self.method).backward_ratio * self.density)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types, with `quant_method`, as the state file stores them."""
        return {spec.name: copy.deepcopy(getattr(self, spec.name)) for spec in fields(self)}

    @overload
    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: Literal[False] = False, **kwargs: Any
    ) -> "TopKastConfig": ...

    @overload
    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> "tuple[TopKastConfig, dict[str, Any]]": ...

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "TopKastConfig | tuple[TopKastConfig, dict[str, Any]]":
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
