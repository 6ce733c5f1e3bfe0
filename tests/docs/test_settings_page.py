"""The page of settings cannot go stale: it is made from `TopKastConfig`, and a field that it lacks is an error."""

import re
from dataclasses import field, fields, make_dataclass

import config_fields
import pytest
from code_blocks import DOCS
from readme_parts import section

from hf_topkast import TopKastConfig


def shown() -> str:
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    page = page.replace("<!-- generated: settings overview -->", config_fields.overview())
    return page.replace("<!-- generated: settings -->", config_fields.details())


@pytest.mark.parametrize("name", [spec.name for spec in fields(TopKastConfig) if spec.init])
def test_a_field_has_its_place_its_help_and_its_text(name):
    page, (spec,) = shown(), [spec for spec in fields(TopKastConfig) if spec.name == name]
    assert page.count(f"#### `{name}` {{ #{name} }}") == 1
    (row,) = re.findall(rf"^\| \[`{name}`\]\(#{name}\) \| (.*) \|$", page, re.M)
    assert row.replace("\\", "").replace("&lt;", "<") == spec.metadata["help"].replace("\\", "")
    _, text = config_fields.described()[name]
    after = page.split(f"{{ #{name} }}", 1)[1].split("####", 1)[0]
    words = re.findall(r"\w+", re.sub(r"\[`|`\]|docs/methods.md", "", text))
    assert len(words) > 3 and set(words) <= set(re.findall(r"\w+", after))
    assert all(f"`{choice!r}`" in after for choice in spec.metadata.get("choices", ()))


def test_a_field_in_no_group_stops_the_build(monkeypatch):
    more = make_dataclass("More", [("surprise", int, field(default=0))], bases=(TopKastConfig,))
    monkeypatch.setattr(config_fields, "TopKastConfig", more)
    with pytest.raises(ValueError, match="surprise"):
        config_fields.overview()


def test_a_section_that_the_readme_lost_stops_the_build():
    with pytest.raises(ValueError, match=r"no section 'Never written'"):
        section("Never written")
