"""What the value of a setting may be, and the error that says so."""

import math
import re
from typing import Any


def number(value: Any) -> float:
    """The value if it is a number, else NaN, which no range contains."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def whole(value: Any) -> float:
    """The value if it is a finite whole number, else NaN."""
    real = number(value)
    return real if math.isfinite(real) and real == int(real) else math.nan


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
