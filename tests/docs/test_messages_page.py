"""
The page of messages has every one that the package raises or warns with.

What is looked for is read from the source in another way than the page's own: the longest literal piece of every
`raise` and every warning.
"""

import ast
import re
from pathlib import Path

import pytest
import raised_messages
from code_blocks import DOCS

import hf_topkast
from hf_topkast.training.engines import DEEPSPEED, FSDP1


PACKAGE = Path(hf_topkast.__file__).parent
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
# Raised to leave a loop or a process, without words for a user.
WORDLESS = {"_Seen", "typer.Exit"}
# Texts with a name of their own, which the next test looks for.
NAMED = {"DEEPSPEED", "FSDP1", "TABLE.notice"}


def literals(node: ast.AST) -> list[str]:
    """The pieces of text in an expression, f-strings' included."""
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def raise_sites():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield path, node.lineno, ast.unparse(node.exc.func), node.exc
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("logger.warning", "warnings.warn")):
                yield path, node.lineno, "warning", node


@pytest.fixture(scope="module")
def listed() -> str:
    return re.sub(r"\s+", " ", "\n".join(message.text for message in raised_messages.collect()))


def test_every_message_is_on_the_page(listed):
    lacking = []
    for path, line, kind, node in raise_sites():
        pieces = [re.sub(r"\s+", " ", piece).strip() for piece in literals(node)]
        longest = max(pieces, key=len, default="")
        if not longest or re.sub(r"\W", "", longest) == "":
            if kind not in WORDLESS and not {ast.unparse(part) for part in node.args} & NAMED:
                lacking.append(f"{path}:{line} {kind} without words")
        elif longest not in listed:
            lacking.append(f"{path}:{line} {longest}")
    assert not lacking
    assert sum(1 for _ in raise_sites()) > 200


def test_what_is_raised_by_the_name_of_a_text_is_on_the_page(listed):
    for text in (
        DEEPSPEED,
        FSDP1,
        "hf_topkast uses the built-in table for",
        "chooses between sparse and dense products by",
    ):
        assert text in listed


def test_every_room_has_a_place():
    page = raised_messages.page()
    for title in raised_messages.ROOMS:
        assert f"### {title}" in page
    with pytest.raises(KeyError, match="attic"):
        raised_messages.room_of(PACKAGE / "attic" / "box.py")


def test_the_checks_of_settings_name_their_fields():
    texts = {message.text for message in raised_messages.collect()}
    assert "penalty=‹value› is not allowed: it must be a finite number, at least 0." in texts
    assert any(text.startswith("explore_until=‹value› is not allowed: it must be a fraction") for text in texts)


@pytest.mark.parametrize("heading", re.findall(r'^### "(.*)" \{', PAGE, re.M))
def test_an_explained_message_is_still_one(heading, listed):
    pattern = ".{0,80}?".join(re.escape(piece) for piece in heading.split("…"))
    assert re.search(pattern, listed), "the message has changed, and its explanation has not"


def test_a_new_message_would_be_missed(tmp_path, monkeypatch):
    (tmp_path / "surgery").mkdir()
    source = 'def f(name):\n    raise ValueError(f"Layer {name!r} is too heavy to be carried by two.")\n'
    (tmp_path / "surgery" / "new.py").write_text(source)
    monkeypatch.setattr(raised_messages, "PACKAGE", tmp_path)
    (message,) = raised_messages.collect()
    assert (message.kind, message.text) == ("ValueError", "Layer ‹name› is too heavy to be carried by two.")
    assert "<var>name</var> is too heavy" in raised_messages.page()
