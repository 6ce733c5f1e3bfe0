"""
Links of README, CONTRIBUTING and the recipes lead somewhere; those within the site are checked by its strict build.

Links that lead out of the project are not fetched. `python tests/docs/test_links.py` lists them.
"""

import re
from pathlib import Path

import pytest
import yaml
from code_blocks import DOCS, PAGES, ROOT

import hf_topkast


OUTSIDE_THE_SITE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "recipes").rglob("*.md"))]


def prose(path: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(path)))


def anchors(path: Path) -> set[str]:
    """Those of a page's headings: as the site makes them, or as the page names them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.M):
        named = re.search(r"\{ #(\S+) \}", heading)
        plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        found.add(named[1] if named else re.sub(r"[\s-]+", "-", plain))
    return found


@pytest.mark.parametrize("page", OUTSIDE_THE_SITE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page):
    for link in links(page):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


def test_pages_that_messages_name_are_there():
    named = set()
    for path in Path(hf_topkast.__file__).parent.rglob("*.py"):
        named |= set(re.findall(r"docs/(\w+\.md)", path.read_text(encoding="utf-8")))
    assert named and all((DOCS / name).is_file() for name in named)


def test_every_page_stands_in_the_navigation_once():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(config)["nav"]
    placed = re.findall(r"\w+\.md", str(nav))
    assert sorted(placed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_everything_public_is_on_the_page_of_the_api():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: hf_topkast\.(\w+)$", page, re.M)) == sorted(hf_topkast.__all__)


def test_numbers_of_the_home_page_stand_where_they_were_measured():
    sources = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md"))
    (measured,) = re.findall(r"## Measured\n(.*?)\n## ", (DOCS / "index.md").read_text(encoding="utf-8"), re.S)
    numbers = re.findall(r"\d+\.\d+", measured)
    assert len(numbers) > 15 and [number for number in numbers if number not in sources] == []
    # A row there is a column of the README's, where densities go down.
    columns = [column for table in tables(sources) for column in zip(*table)]
    for name, *row in tables(measured)[0][1:]:
        assert any(in_order(row, column) for column in columns), f"{name}: {row}"


def tables(text: str) -> list[list[list[str]]]:
    """Of each table its rows of cells, reduced to their first numbers where they have some; heads come first."""
    found = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        found.append([head, *([row[0], *(first_number(cell) for cell in row[1:])] for row in rows)])
    return found


def first_number(cell: str) -> str:
    match = re.search(r"\d+\.\d+", cell)
    return match[0] if match else cell


def in_order(few: list[str], many: tuple[str, ...]) -> bool:
    """Whether all of the few stand among the many, in their order."""
    rest = iter(many)
    return all(each in rest for each in few)


if __name__ == "__main__":
    outward = {link for page in {*PAGES, *OUTSIDE_THE_SITE} for link in links(page) if "://" in link}
    print("\n".join(sorted(outward)))
