"""What is said of the package outside of it, in pyproject.toml, workflows and citation: it must not go stale."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hf_topkast
from hf_topkast.native import extension


try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob(".github/workflows/*")}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
VERSION = re.match(r"\d+\.\d+\.\d+", hf_topkast.__version__).group()


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no clone: {done.stderr.strip()}")
    return done.stdout.splitlines()


def commands() -> str:
    """What the workflows and .ci/run run."""
    steps = [step for flow in WORKFLOWS.values() for job in flow["jobs"].values() for step in job["steps"]]
    return "\n".join([*(step.get("run", "") for step in steps), (ROOT / ".ci/run").read_text(encoding="utf-8")])


def matrix() -> list[dict[str, str]]:
    return WORKFLOWS["tests.yml"]["jobs"]["test"]["strategy"]["matrix"]["include"]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def lower_bound(package: str) -> str:
    return dict(entry.split(">=") for entry in PROJECT["project"]["dependencies"])[package]


def left_out_of(kind: str, files: list[str]) -> list[str]:
    pathspec = pytest.importorskip("pathspec", reason="comes with the extra dev")
    patterns = PROJECT["tool"]["scikit-build"][kind]["exclude"]
    return list(pathspec.PathSpec.from_lines("gitignore", patterns).match_files(files))


def test_no_source_is_ignored_by_git():
    ignored = git("ls-files", "--others", "--ignored", "--exclude-standard", "hf_topkast", "recipes", "examples")
    assert [name for name in ignored if Path(name).suffix in (".py", ".cpp", ".h", ".inl", ".typed", ".yaml")] == []


def test_the_wheel_has_the_package_and_no_sources_of_the_extension():
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_topkast").rglob("*")]
    wanted = [name for name in files if Path(name).suffix in (".py", ".typed", ".json")]
    assert "hf_topkast/py.typed" in wanted
    assert left_out_of("wheel", wanted) == []
    sources = [name for name in files if Path(name).suffix in (".cpp", ".h", ".inl")]
    assert len(sources) > 10
    assert sorted(left_out_of("wheel", sources)) == sorted(sources)


def test_the_sdist_has_what_a_build_needs_and_no_more():
    files = git("ls-files", "--cached", "--others", "--exclude-standard")
    left_out = set(left_out_of("sdist", files))
    packed = [name for name in files if name not in left_out]
    assert [name for name in left_out if name.startswith("hf_topkast/")] == []
    assert {name.split("/")[0] for name in packed if "/" in name} == {"hf_topkast", "recipes"}
    assert {"pyproject.toml", "README.md", "LICENSE", "hf_topkast/native/CMakeLists.txt"} <= set(packed)


def test_every_folder_of_the_wheel_keeps_its_name():
    """The build refuses others, which nobody sees before a release."""
    packages = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]
    assert all(Path(inside).name == Path(outside).name for inside, outside in packages.items())


def test_the_package_is_not_more_than_its_folder():
    """In place, a folder mapped into it would have the repository searched for parts of it."""
    assert str(ROOT) not in hf_topkast.__path__


def test_what_is_exported_is_checked_for_annotations():
    parts = PROJECT["tool"]["mypy"]["overrides"]
    strict = next(part["module"] for part in parts if part.get("disallow_any_generics"))
    homes = {getattr(hf_topkast, name).__module__ for name in hf_topkast.__all__}
    assert homes - set(strict) == set()


def test_modules_named_to_mypy_exist():
    parts = PROJECT["tool"]["mypy"]["overrides"]
    names = [name.removesuffix(".*") for part in parts for name in part["module"] if name.startswith("hf_topkast")]
    places = [ROOT.joinpath(*name.split(".")) for name in names]
    assert [place for place in places if not (place.is_dir() or place.with_suffix(".py").is_file())] == []


def test_what_users_write_takes_all_that_is_exported():
    used = re.findall(r"\w+", (ROOT / "tests/typed_use.py").read_text(encoding="utf-8"))
    assert [name for name in hf_topkast.__all__ if used.count(name) < 2] == []  # once where it is imported


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION
    assert "Top-KAST: Top-K Always Sparse Training" in [each["title"] for each in citation["references"]]
    newest = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest.groups() == (VERSION, citation["date-released"])


def test_workflows_make_what_the_makefile_has():
    called = set(re.findall(r"^\s*make ([\w-]+)", commands(), re.MULTILINE))
    assert {"lint", "types", "test", "test-all", "docs", "dist"} <= called
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    assert called <= targets
    assert set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE).group(1).split()) == targets


def test_the_matrix_begins_where_the_package_does():
    rows = matrix()
    oldest = {key: min((row[key] for row in rows if row[key] != "latest"), key=numbers) for key in rows[0]}
    assert oldest == {
        "python": PROJECT["project"]["requires-python"].removeprefix(">="),
        "torch": lower_bound("torch"),
        "transformers": lower_bound("transformers"),
    }
    assert oldest in rows
    for part in ("torch", "transformers"):  # each alone beside the newest of the other, too
        assert [row for row in rows if row[part] == oldest[part] and row != {**row, **oldest}] != []


def test_workflows_take_the_torch_of_the_makefile():
    release = re.search(r"^TORCH \?= torch==(\d+\.\d+)", MAKEFILE, re.MULTILINE).group(1)
    assert max((row["torch"] for row in matrix()), key=numbers) == release
    assert set(re.findall(r"torch==(\d+\.\d+)", commands())) == {release}


def test_wheels_are_built_for_each_python():
    """One for each before the stable interface, which begins at Python 3.12 and serves all later ones."""
    stable = PROJECT["tool"]["scikit-build"]["wheel"]["py-api"]
    minors = range(numbers(PROJECT["project"]["requires-python"].removeprefix(">="))[1], int(stable[3:]) + 1)
    assert PROJECT["tool"]["cibuildwheel"]["build"] == [f"cp3{minor}-*" for minor in minors]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="each of these has a wheel of its own")
@pytest.mark.skipif(extension is None, reason="the C++ extension is not built")
def test_the_extension_serves_later_pythons_too():
    """Its wheel says so; one of another name would not be found there, and the kernels be missing without an error."""
    assert Path(extension.__file__).name == "_native.abi3.so"
