"""The scripts of `examples/` run, on tiny local stand-ins, and leave what they say."""

import runpy
import sys
from pathlib import Path

import pytest
from code_blocks import DOCS, blocks
from standins import TEXTS, make_model, make_pruned, make_tokenizer
from transformers import AutoModelForCausalLM

from hf_topkast.method import METHODS
from hf_topkast.surgery import sparse_layers


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script in an empty directory, and gives what it printed."""
    monkeypatch.chdir(tmp_path)
    before = dict(METHODS)

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield script
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "notes.txt").write_text("\n".join(TEXTS) * 8, encoding="utf-8")
    return "notes.txt"


def stand_in(model, folder: str) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_all_are_short_and_run_here():
    scripts = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == {"pretrain", "fine_tune", "keep_pruned", "own_method"}
    assert max(scripts.values()) < 60


def test_pretrain(run):
    printed = run("pretrain.py", "2")
    shown = blocks(DOCS / "quick_start.md", "text")[0].text.splitlines()
    assert len(shown) > 8 and set(shown) - {"..."} <= set(printed.splitlines())
    assert "topkast/density" in printed and "def test_" in printed
    model = AutoModelForCausalLM.from_pretrained("runs/quick-start/model")
    assert sum(1 for _ in sparse_layers(model)) == 16


def test_fine_tune(run, text):
    printed = run("fine_tune.py", stand_in(make_model(), "tiny"), text, "2")
    assert "0.5000   0.5000" in printed and "distill/logits" in printed
    assert Path("runs/fine-tuned/model/topkast_state.safetensors").is_file()


def test_keep_pruned(run, text):
    printed = run("keep_pruned.py", stand_in(make_pruned(), "tiny-pruned"), text, "2")
    assert "zeros are still there" in printed
    assert not Path("runs/kept/model/topkast_state.safetensors").exists()


def test_own_method(run):
    first, second = (float(line.split(":")[1].split("%")[0]) for line in run("own_method.py", "20").splitlines()[-2:])
    assert 0 < second < first
