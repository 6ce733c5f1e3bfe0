"""What the value of a setting may be and when it may change, and the error that says so."""

import math
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any


def number(value: Any) -> float:
    """The value if it is a number, else NaN, which no range contains."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def whole(value: Any) -> float:
    """The value if it is a finite whole number, else NaN."""
    real = number(value)
    return real if math.isfinite(real) and real == int(real) else math.nan


def plain(value: Any) -> Any:
    """A number of numpy or torch as Python's own, also inside lists and dictionaries, so that JSON can hold it."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(plain(entry) for entry in value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def parsed(text: str, parse) -> Any:
    """What the command line's text stands for, or the text itself, which the field's check then refuses."""
    try:
        return parse(text)
    except ValueError:
        return text


def check_regex(name: str, pattern: str):
    """
    Raises:
        ValueError: if the pattern of the setting `name` is not a regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{name}={pattern!r} is not a regular expression ({error}); a list of names is matched by suffix."
        ) from error


def check(valid: bool, name: str, value: Any, allowed: str):
    """
    Raises:
        ValueError: if the value of the setting `name` is not `valid`; `allowed` says what would be.
    """
    if not valid:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}.")


class GuardedSettings:
    """
    A dataclass of settings whose fields, once it is made, can be set to what it could have been made with, and only
    where nothing depends on the value that they had.
    """

    _fixed: "dict[str, str]"

    def guard(self):
        """From now on every change of a field is checked."""
        self.__dict__.setdefault("_fixed", {})

    def fix(self, names: Iterable[str], why: str):
        """Refuses changes of these fields; `why` is the end of a sentence, with the way out."""
        self._fixed.update(dict.fromkeys(names, why))

    def release(self, why: str):
        """Takes back what [`GuardedSettings.fix`] was told with the same `why`."""
        self.__dict__["_fixed"] = {name: reason for name, reason in self._fixed.items() if reason != why}

    def derived(self) -> set[str]:
        """The fields that were not given and follow from others: they go on to do so."""
        return set()

    def __setattr__(self, name: str, value: Any):
        if "_fixed" not in self.__dict__ or name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        now = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.init}
        if name not in now:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}; the fields are {sorted(now)}.")
        if name in self._fixed:
            raise ValueError(f"{name}={value!r} is not allowed now: it is {now[name]!r} and {self._fixed[name]}.")
        changed = type(self)(**{**now, **dict.fromkeys(self.derived()), name: value})  # as checked as a new one
        self.__dict__.update({key: getattr(changed, key) for key in now})
