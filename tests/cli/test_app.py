import subprocess
import sys

import pytest

import hf_topkast
from hf_topkast.cli import main


VERBS = ("inspect", "compare", "densify", "export", "train", "report", "plot", "doctor", "calibrate")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples(verb, run):
    printed = run(verb, "--help")
    assert "Examples" in printed and f"hf-topkast {verb}" in printed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_prints_json(verb, run):
    assert "--json" in run(verb, "--help")


def test_without_a_verb_it_lists_them(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in VERBS)


def test_version(run):
    assert run("--version").strip() == hf_topkast.__version__


@pytest.mark.parametrize("words", [["inspekt"], ["inspect"], ["inspect", "--jsn", "x"], ["plot", "--metric"]])
def test_misspelt_words_are_one_line(words, refused):
    assert len(refused(*words)) < 200


def test_traceback_on_demand(tmp_path):
    with pytest.raises(ValueError, match="no directory"):
        main(["--traceback", "inspect", str(tmp_path / "nowhere")])


def test_as_a_module():
    command = [sys.executable, "-m", "hf_topkast", "inspect", "./nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "hf-topkast: There is no directory ./nowhere.\n"
