"""The page about the command line has every verb and every option of it."""

import re
from pathlib import Path

import pytest
import typer

from hf_topkast.cli.app import app


PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_page_has_the_verb_and_its_options(verb):
    (section,) = re.findall(rf"^## [^\n]*\b{verb}\b.*?(?=^## |\Z)", PAGE, re.M | re.S)
    assert f"hf-topkast {verb}" in section
    options = {option for parameter in COMMANDS[verb].params for option in parameter.opts if option.startswith("--")}
    for option in options - {"--help", "--json", "--metric", "--output"}:
        assert option in section, option


def test_help_has_no_verb_that_the_page_lacks():
    assert set(COMMANDS) == set(re.findall(r"\[`(\w+)`\]\(#", PAGE))
