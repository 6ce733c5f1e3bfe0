"""YAML as sweep files and the runs of a sweep have it."""

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everyone means it, and a key that stands twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"`{key}` stands twice in the lines after {node.start_mark.line}.")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(source: Path | str, name: str | None = None) -> dict[str, Any]:
    """
    A mapping from a YAML file, or from YAML itself.

    Raises:
        `ValueError`: If it does not exist, is not YAML or not a mapping; the message has the name.
    """
    name = name or f"`{source}`"
    if isinstance(source, Path):
        if not source.is_file():
            raise ValueError(f"There is no file {name}.")
        source = source.read_text(encoding="utf-8")
    try:
        content = yaml.load(source, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a list of `field: value` lines.")
    return content


def dump_yaml(settings: dict[str, Any]) -> str:
    """A run's settings as a file for run_clm.py."""
    return yaml.safe_dump(settings, sort_keys=True)
