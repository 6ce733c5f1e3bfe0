"""What the build puts into pages, and how it reads docstrings."""

import inspect
import re

import pytest
import room_tour
import site_build
from code_blocks import DOCS, ROOT

import hf_topkast


def test_every_mark_of_a_page_is_replaced():
    marks = {mark for page in DOCS.glob("*.md") for mark in re.findall(r"<!-- generated: (.*?) -->", page.read_text())}
    assert marks == site_build.GENERATED.keys()
    for mark in marks:
        shown = site_build.generate(f"before\n\n<!-- generated: {mark} -->\n\nafter")
        assert len(shown) > 300 and "<!-- generated" not in shown


def test_the_tour_has_every_room():
    rooms = {path.parent.name for path in room_tour.PACKAGE.glob("*/__init__.py")}
    assert rooms == set(room_tour.ROOMS)
    assert all(f"### `{room}/`" in room_tour.tour() for room in rooms)


def test_the_diagram_has_only_the_colours_of_the_page():
    drawn = (DOCS / "images" / "sets.svg").read_text(encoding="utf-8")
    style = (ROOT / "docs" / "css" / "topkast.css").read_text(encoding="utf-8")
    assert not re.search(r"fill=|stroke=|#[0-9a-f]{3,6}\b(?!\))", drawn)
    assert "\n\n" not in drawn  # where Markdown would end it
    for scheme in ("default", "slate"):
        part = style.split(f'[data-md-color-scheme="{scheme}"] {{')[1].split("}")[0]
        assert all(f"--topkast-{name}:" in part for name in ("a", "b", "c", "warm", "on-a"))


@pytest.mark.parametrize("name", hf_topkast.__all__)
def test_docstrings_are_read_as_they_are_meant(name):
    griffe = pytest.importorskip("griffe")
    from hf_docstrings import as_google

    text = inspect.getdoc(getattr(hf_topkast, name))
    docstring = griffe.Docstring(as_google(text))
    sections = docstring.parse("google", warnings=False, returns_named_value=False)
    kinds = [section.kind.value for section in sections]
    for title, kind in (("Args", "parameters"), ("Attributes", "attributes"), ("Raises", "raises")):
        assert (f"\n{title}:\n" in text) == (kind in kinds)
    (entries,) = [section.value for section in sections if section.kind.value == "parameters"] or [[]]
    assert all(re.fullmatch(r"\w+", entry.name) and entry.description for entry in entries)
