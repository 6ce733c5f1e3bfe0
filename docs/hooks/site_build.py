"""Hooks of the site's build: what pages have generated, and the list of links that lead away from it."""

import logging
import re
from pathlib import Path

import config_fields
import raised_messages
import readme_parts
import room_tour


logger = logging.getLogger("mkdocs.hooks.site_build")

ROOT = Path(__file__).parents[2]
# What stands in a page as `<!-- generated: NAME -->`, by name.
GENERATED = {
    "settings overview": config_fields.overview,
    "settings": config_fields.details,
    "messages": raised_messages.page,
    "rooms": room_tour.tour,
    "diagram": lambda: (ROOT / "docs" / "images" / "sets.svg").read_text(encoding="utf-8"),
    "changelog": lambda: (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    "contributing": lambda: (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    "measured": lambda: readme_parts.section("What you get"),
    "not measured": lambda: readme_parts.section("What is not faster or smaller"),
}
_external: dict[str, set[str]] = {}


def generate(markdown: str) -> str:
    """A page with its generated parts in their places."""
    return re.sub(r"<!-- generated: ([a-z ]+) -->", lambda found: GENERATED[found[1]](), markdown)


def on_page_markdown(markdown: str, **kwargs) -> str:
    return generate(markdown)


def on_page_content(html: str, page, **kwargs):
    for link in re.findall(r'href="(https?://[^"]+)"', html):
        _external.setdefault(link, set()).add(page.file.src_uri)


def on_post_build(config, **kwargs):
    """Links within the site are checked by the build, those that lead away from it are listed: none is fetched."""
    lines = [f"{link}  ({', '.join(sorted(pages))})" for link, pages in sorted(_external.items())]
    path = Path(config["site_dir"]) / "external_links.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    logger.info("%d links lead away from the site: %s", len(lines), path)
