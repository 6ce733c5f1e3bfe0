"""The settings page's fields, from `TopKastConfig` itself: types and texts of its docstring, help texts, choices."""

import inspect
import re
from dataclasses import Field, fields

from hf_topkast import TopKastConfig


# Which fields stand together; one that stands nowhere is an error.
GROUPS = {
    "Sizes of the sets": (
        "density",
        "backward_density",
        "initial_density",
        "density_schedule",
        "schedule_begin",
        "schedule_end",
        "distribution",
        "density_overrides",
        "split_fused",
    ),
    "Choice of the sets": ("method", "score", "compare", "drop_share", "drop_end", "drop_decay", "seed"),
    "Times of choices": ("refresh_every", "refresh_lag", "explore_until", "update_until"),
    "Training of the values": (
        "exploration_lr_scale",
        "lr_scale",
        "penalty",
        "penalty_mode",
        "new_state",
        "new_state_warmup",
        "powerprop_alpha",
    ),
    "Layers": ("target_modules", "exclude_modules"),
    "Storage and products": ("block_size", "scatter_blocks", "reservoir_device", "backend"),
}


def settable() -> dict[str, Field]:
    """
    The fields that a user may give, in the order of the page.

    Raises:
        ValueError: if a field of `TopKastConfig` stands in no group, or a group names what is no field.
    """
    known = {field.name: field for field in fields(TopKastConfig) if field.init}
    placed = [name for names in GROUPS.values() for name in names]
    odd = set(known) ^ set(placed)
    if odd or len(placed) != len(known):
        raise ValueError(
            f"docs/hooks/config_fields.py: GROUPS and the fields of TopKastConfig differ by {sorted(odd)}."
        )
    return {name: known[name] for name in placed}


def described() -> dict[str, tuple[str, str]]:
    """What the docstring of `TopKastConfig` says of each field: its type and default, and the text."""
    (arguments,) = re.findall(r"\nArgs:\n(.*?)\n\w+:\n", inspect.getdoc(TopKastConfig), re.S)
    entries = re.findall(r"^    (\w+) \((.*)\):\n((?:        .*\n?)+)", arguments, re.M)
    return {name: (kind, re.sub(r"\s+", " ", text).strip()) for name, kind, text in entries}


def overview() -> str:
    """A table of all fields with their help texts, those of the command line."""
    rows = [f"| [`{name}`](#{name}) | {_escaped(field.metadata['help'])} |" for name, field in settable().items()]
    return "\n".join(["| field | what it is, and its default |", "| --- | --- |", *rows])


def details() -> str:
    """A heading for each field, with type, default, choices and the docstring's text."""
    all_fields, texts = settable(), described()
    lines = []
    for title, names in GROUPS.items():
        lines += [f"### {title}", ""]
        for name in names:
            kind, text = texts[name]
            choices = all_fields[name].metadata.get("choices")
            one_of = f" One of {', '.join(f'`{choice!r}`' for choice in choices)}." if choices else ""
            lines += [f"#### `{name}` {{ #{name} }}", "", f"*{_linked(kind).replace('*', '')}*.{one_of}", ""]
            lines += [_linked(text), ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _linked(text: str) -> str:
    """References as links into the API page, and a field's own name as one to its place."""
    text = re.sub(r"\[`([\w.]+)`\]", r"[`\1`](api.md)", text)
    return text.replace("docs/methods.md", "[methods](methods.md)").replace("B\\\\A", "B\\A")
