"""What shell blocks of README and docs name exists: scripts, modules, make targets, verbs, and their options."""

import importlib.util
import re
import shlex

import pytest
from code_blocks import ROOT, blocks, with_blocks


# What stands for something of the reader's own.
THEIRS = re.compile(r"train\.py|[A-Z_]+(\.\w+)?|(runs|out)\b.*|wiki\.txt")


def commands(page) -> list[list[str]]:
    """The commands of a page's shell blocks as words, without comments and settings of the environment."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
            if words:
                found.append(words)
    return found


def options_known_to(source: str, words: list[str]) -> list[str]:
    """The options among the words that a source does not mention, spelt with - or with _."""
    given = [re.match(r"--([\w-]+)", word)[1] for word in words if word.startswith("--")]
    return [name for name in given if not re.search(rf"\b{name.replace('-', '[-_]')}\b", source)]


def texts_of(folder) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))


def check(words: list[str]):
    program, *rest = words
    if program == "python" and rest[0] == "-m":
        module = ROOT / (rest[1].replace(".", "/") + ".py")
        if rest[1].startswith("benchmarks."):
            assert module.is_file(), rest[1]
            shared = (ROOT / "benchmarks" / "measure.py").read_text(encoding="utf-8")
            assert options_known_to(module.read_text(encoding="utf-8") + shared, rest[2:]) == []
        else:
            assert importlib.util.find_spec(rest[1].split(".")[0]), rest[1]
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert rest[0] in targets, rest[0]
    elif program == "hf-topkast":
        verbs = ROOT / "hf_topkast" / "cli"
        assert (
            rest == []
            or rest[0].startswith("-")
            or (verbs / f"{rest[0]}.py").is_file()
            or re.search(rf"\b{rest[0]}\b", texts_of(verbs))
        ), rest[0]
        assert options_known_to(texts_of(verbs) + texts_of(ROOT / "recipes"), rest[1:]) == []
    elif program in ("python", "accelerate", "pip") or "/" in program:
        for word in words:
            if re.search(r"^[\w./]+\.(py|yaml|sh)$", word) and not THEIRS.fullmatch(word):
                assert (ROOT / word).is_file(), word
    else:
        raise AssertionError(f"{program} is a command that this test does not know: teach it, or leave it out.")


@pytest.mark.parametrize("page", with_blocks("bash"), ids=lambda page: page.stem)
def test_what_the_commands_of_a_page_name_exists(page):
    for words in commands(page):
        check(words)


@pytest.mark.parametrize(
    "line", ["make coffee", "python -m benchmarks.step_time --wings 2", "python recipes/none.py", "hf-topkast juggle"]
)
def test_what_does_not_exist_is_noticed(line):
    with pytest.raises(AssertionError):
        check(shlex.split(line))
