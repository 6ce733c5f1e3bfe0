"""A Griffe extension: docstrings in the style of transformers, as the Google style that mkdocstrings reads."""

import re

import griffe

import hf_topkast


# "    name, other (`type`, *optional*, defaults to 1): text" of an argument or attribute, with the lines that follow.
ENTRY = re.compile(r"^    (\w+(?:, \w+)*)(?: \((.*)\))?:(.*(?:\n {8}.*)*)", re.M)
SECTION = re.compile(r"(?<=\n)(Args|Attributes):\n((?: {4}.*(?:\n|$))+)")
RETURNED = re.compile(r"(?<=\nReturns:\n)    \[?`(.*?)`\]?(?:, \*optional\*)?: ")


def as_google(text: str) -> str:
    """
    A docstring with the entries of its sections as Griffe reads them, and [`names`] as links into the API page.

    Arguments lose what the signature says of them, their types and defaults; names that share an entry get one each.
    """
    text = SECTION.sub(lambda found: f"{found[1]}:\n{ENTRY.sub(_entry, found[2])}", text)
    text = RETURNED.sub(r"    \1: ", text)
    return re.sub(r"\[`([\w.]+)`\]", _link, text)


def _entry(found: re.Match) -> str:
    names, kind, rest = found.groups()
    types = re.findall("`([^`]+)`", kind.split(", *optional*")[0]) if kind else []
    shown = f" ({' | '.join(types)})" if types else ""
    return "\n".join(f"    {name}{shown}:{rest}" for name in names.split(", "))


def _link(found: re.Match) -> str:
    name = found[1].removeprefix("hf_topkast.")
    known = name.split(".")[0] in hf_topkast.__all__
    return f"[`{name}`][hf_topkast.{name}]" if known else f"`{name}`"


class HFDocstrings(griffe.Extension):
    """Rewrites each docstring of the package before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = as_google(obj.docstring.value)
