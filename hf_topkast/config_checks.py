"""Whether the fields of a configuration go together, and the one form of those that may be given in several."""

import json
import math
from dataclasses import fields
from typing import TYPE_CHECKING

from .checks import check, check_regex, number, parsed, whole
from .method import EXCHANGE, Method, get_method


if TYPE_CHECKING:
    from .config import TopKastConfig

# What only goes with a density schedule.
SCHEDULE = ("density_schedule", "schedule_begin", "schedule_end")


def check_density(config: "TopKastConfig"):
    """
    The density by itself and the method, which the defaults of other fields follow from.

    Raises:
        ValueError: if there is no such method, or `density` is neither a share nor `"nonzero"`.
    """
    get_method(config.method)
    if isinstance(config.density, str) and config.density != "nonzero":
        config.density = parsed(config.density, float)  # from the command line
    valid = config.density == "nonzero" or 0 < number(config.density) <= 1
    check(valid, "density", config.density, "a number in (0, 1], or 'nonzero'")


def check_fields(config):
    """
    All fields, each by itself and with the others; those that have several forms get one.

    Raises:
        ValueError: if one is not allowed.
    """
    _check_densities(config)
    allowed = "a whole number of optimizer steps, at least 1"
    check(whole(config.refresh_every) >= 1, "refresh_every", config.refresh_every, allowed)
    allowed = f"a whole number of optimizer steps, at least 0 and less than refresh_every={config.refresh_every}"
    check(0 <= whole(config.refresh_lag) < config.refresh_every, "refresh_lag", config.refresh_lag, allowed)
    _check_moment(config, "explore_until")
    _check_schedule(config)
    _check_overrides(config)
    for name in ("penalty", "exploration_lr_scale"):
        value = getattr(config, name)
        check(0 <= number(value) < math.inf, name, value, "a finite number, at least 0")
    check(0 < number(config.lr_scale) < math.inf, "lr_scale", config.lr_scale, "a finite number above 0")
    alpha = config.powerprop_alpha
    check(1 <= number(alpha) < math.inf, "powerprop_alpha", alpha, "a finite number, at least 1")
    check(whole(config.seed) >= 0, "seed", config.seed, "a whole number, at least 0")
    for spec in fields(config):
        choices = spec.metadata.get("choices")
        value = getattr(config, spec.name)
        if choices and (value is not None or spec.default is not None):
            check(value in choices, spec.name, value, "one of " + ", ".join(map(repr, choices)))
    _check_new_state(config)
    _check_method(config, get_method(config.method))
    _check_block_size(config)
    for name in ("target_modules", "exclude_modules"):
        _check_module_rule(config, name)
    check(isinstance(config.split_fused, bool), "split_fused", config.split_fused, "True or False")


def _check_densities(config: "TopKastConfig"):
    if config.density == "nonzero":
        least = 0
        allowed = "'uniform' with density='nonzero': the zeros say how dense each layer is"
        check(config.distribution == "uniform", "distribution", config.distribution, allowed)
        allowed = f"a number with method={config.method!r}, which starts dense"
        check("initial_density" not in get_method(config.method).defaults, "density", config.density, allowed)
        allowed = "'layer' with density='nonzero': the zeros say how dense each row is"
        check(config.compare == "layer", "compare", config.compare, allowed)
    else:
        least = config.density
    if config.backward_density is not None:
        allowed = f"a number in [density, 1] = [{least}, 1]: B contains A"
        check(least <= number(config.backward_density) <= 1, "backward_density", config.backward_density, allowed)


def _check_moment(config: "TopKastConfig", name: str):
    value = getattr(config, name)
    if value is not None:
        allowed = "a fraction of training in [0, 1], a step (a whole number above 1), or None"
        check(0 <= number(value) <= 1 or whole(value) > 1, name, value, allowed)


def _check_new_state(config: "TopKastConfig"):
    steps = config.new_state_warmup
    check(whole(steps) >= 0, "new_state_warmup", steps, "a whole number of optimizer steps, at least 0")
    allowed = "left out unless new_state='fresh': only then a weight has an age"
    check(steps == 0 or config.new_state == "fresh", "new_state_warmup", steps, allowed)


def _check_method(config: "TopKastConfig", method: Method):
    """Whether the method takes what was given: a field that it would pass over is an error."""
    for name in EXCHANGE:
        value = getattr(config, name)
        allowed = f"left out with method={config.method!r}, which does not exchange a share of A"
        check(value is None or name in method.defaults, name, value, allowed)
    if config.drop_share is not None:
        check(0 <= number(config.drop_share) <= 1, "drop_share", config.drop_share, "a number in [0, 1]")
        allowed = f"a number in [0, drop_share] = [0, {config.drop_share}]"
        check(0 <= number(config.drop_end or 0) <= config.drop_share, "drop_end", config.drop_end, allowed)
        allowed = f"left out with drop_decay={config.drop_decay!r}, which does not go towards it"
        check(not config.drop_end or config.drop_decay == "cosine", "drop_end", config.drop_end, allowed)
        allowed = "'uniform' or 'erdos_renyi' with a method that exchanges weights: a layer keeps its size"
        check(config.distribution != "global", "distribution", config.distribution, allowed)
    _check_moment(config, "update_until")
    for name, plain in (("score", "magnitude"), ("compare", "layer")):
        allowed = f"{plain!r} with method={config.method!r}, whose A is not what ranks highest"
        check(method.ranks or getattr(config, name) == plain, name, getattr(config, name), allowed)
    if not method.explores:
        for name, idle in (("explore_until", None), ("exploration_lr_scale", 1)):
            value = getattr(config, name)
            check(value == idle, name, value, f"left out with method={config.method!r}, whose B is A")
        allowed = f"left out, or equal to density, with method={config.method!r}, whose B is A"
        alike = config.density == "nonzero" and config.backward_density is None
        check(alike or config.backward_density == config.density, "backward_density", config.backward_density, allowed)
    if not method.keeps_values:
        allowed = f"'same' with method={config.method!r}, which stores nothing outside B"
        check(config.reservoir_device == "same", "reservoir_device", config.reservoir_device, allowed)
        allowed = f"1 with method={config.method!r}, whose new weights are zero: there θ has no slope, and never moves"
        check(config.powerprop_alpha == 1 or not method.grows, "powerprop_alpha", config.powerprop_alpha, allowed)
    moves = config.density == "nonzero" and method.refreshes
    allowed = "1 with density='nonzero' and sets that change: a zero that enters has no slope, and never moves"
    check(config.powerprop_alpha == 1 or not moves, "powerprop_alpha", config.powerprop_alpha, allowed)
    everything = config.density == "nonzero" or method.backward_ratio < math.inf or config.backward_density == 1
    allowed = f"left out, or 1, with method={config.method!r}, whose B is everything"
    check(everything, "backward_density", config.backward_density, allowed)
    if method.gradient is not None:
        allowed = f"0 with method={config.method!r}, which needs the gradients of the very step"
        check(config.refresh_lag == 0, "refresh_lag", config.refresh_lag, allowed)


def _check_schedule(config: "TopKastConfig"):
    if config.initial_density is None:
        for name in SCHEDULE:
            value = getattr(config, name)
            check(value is None, name, value, "left out where initial_density is not given: no density changes")
        return
    check(0 < number(config.initial_density) <= 1, "initial_density", config.initial_density, "a number in (0, 1]")
    method = get_method(config.method)
    settings = ("density='nonzero'", f"method={config.method!r}")
    for setting, keeps_sizes in zip(settings, (config.density == "nonzero", not method.refreshes)):
        allowed = f"left out with {setting}: the sets keep their sizes"
        check(not keeps_sizes, "initial_density", config.initial_density, allowed)
    allowed = f"at least every density with method={config.method!r}: what is pruned stays out"
    overrides = config.density_overrides if isinstance(config.density_overrides, dict) else {}
    falls = method.grows or config.initial_density >= max([config.density, *map(number, overrides.values())])
    check(falls, "initial_density", config.initial_density, allowed)
    for name in ("schedule_begin", "schedule_end"):
        _check_moment(config, name)
    if (config.schedule_begin > 1) == (config.schedule_end > 1):  # else only the number of steps can tell
        allowed = f"below schedule_end={config.schedule_end!r}"
        check(config.schedule_begin < config.schedule_end, "schedule_begin", config.schedule_begin, allowed)


def _check_overrides(config: "TopKastConfig"):
    if isinstance(config.density_overrides, str):
        config.density_overrides = parsed(config.density_overrides, json.loads)
    overrides = config.density_overrides
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
    check(config.density != "nonzero", "density_overrides", overrides, allowed)


def _check_block_size(config: "TopKastConfig"):
    size = [1] if config.block_size is None else config.block_size
    size = list(size) if isinstance(size, list | tuple) else [size]
    valid = len(size) in (1, 2) and all(whole(side) >= 1 for side in size)
    allowed = "one or two whole numbers, at least 1: the rows and columns of a block"
    check(valid, "block_size", config.block_size, allowed)
    config.block_size = [int(size[0]), int(size[-1])]
    scatter = config.scatter_blocks
    check(isinstance(scatter, bool), "scatter_blocks", scatter, "True or False")
    allowed = "left out unless blocks have several rows (block_size): it is those that it parts"
    check(not scatter or config.block_size[0] > 1, "scatter_blocks", scatter, allowed)
    allowed = "left out with split_fused=True: its blocks have rows of all parts of a projection"
    check(not (scatter and config.split_fused), "scatter_blocks", scatter, allowed)


def _check_module_rule(config: "TopKastConfig", name: str):
    rule = getattr(config, name)
    if isinstance(rule, str):
        check_regex(name, rule)
    elif rule is not None:
        names = isinstance(rule, list | tuple | set) and all(isinstance(entry, str) for entry in rule)
        check(names, name, rule, "a list of module names, one regular expression, or None")
        rule = sorted(rule) if isinstance(rule, set) else list(rule)
        # The command line gives lists only, so the one keyword arrives as a list of one.
        setattr(config, name, "all-linear" if rule == ["all-linear"] else rule)
