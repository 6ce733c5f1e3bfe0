"""Sections of the README for pages of the site, so that a number stands in one place."""

import re
from pathlib import Path


README = Path(__file__).parents[2] / "README.md"


def section(title: str) -> str:
    """
    What stands under a heading of the README, with its links as they are from a page.

    Raises:
        ValueError: if the README has no such heading.
    """
    parts = re.split(r"^## (.+)\n", README.read_text(encoding="utf-8"), flags=re.M)
    if title not in parts:
        raise ValueError(f"README.md has no section {title!r}, which docs/benchmarks.md shows.")
    text = re.sub(r"\]\(docs/", "](", parts[parts.index(title) + 1])
    # Other folders are not on the site.
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)(?!\w+\.md)([^)]*)\)", r"\1 (`\2`)", text).strip()
