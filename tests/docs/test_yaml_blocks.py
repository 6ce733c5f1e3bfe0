"""Configurations shown in README and docs are ones that the recipes read."""

import pytest
from arguments import parse_arguments
from code_blocks import blocks, with_blocks


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=lambda page: page.stem)
def test_the_configurations_of_a_page_are_read(page, tmp_path):
    for block in blocks(page, "yaml"):
        (tmp_path / "my.yaml").write_text(block.text, encoding="utf-8")
        parse_arguments([str(tmp_path / "my.yaml"), "--use_cpu"])


def test_there_are_some():
    assert with_blocks("yaml")
