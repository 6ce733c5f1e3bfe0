"""The code blocks of README and docs."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is that of its first line of code."""

    page: Path
    line: int
    language: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of one language in a page, in their order, without the indentation of a list around them."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", text, re.S | re.M):
        if match[2] == language:
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Block(page, line, language, textwrap.dedent(match[3])))
    return found


def with_blocks(language: str) -> list[Path]:
    """The pages that have some."""
    return [page for page in PAGES if blocks(page, language)]
