"""That fine-tunings of a pretrained model run, are written down once, and start alike. Perplexities are not judged."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import measure, pretrained, pretrained_step


@pytest.fixture
def places(tmp_path):
    measure.make_gpt2(layers=1, width=16, positions=16, vocabulary=256).save_pretrained(tmp_path / "model")
    text = "a text of which a model can learn more than of other text "
    words = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(["?", *sorted(set(text.split()))])}, "?")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(text * 40)
    return [str(tmp_path / name) for name in ("model", "text", "text")]


def test_runs_are_written_once_and_then_passed_over(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    options = ["--steps", "4", "--window", "16", "--batch", "2", "--threads", "1", "--refresh-every", "2"]
    options += ["--calibration", "2", "--densities", "0.5", "--json", str(tmp_path / "out.jsonl")]
    runs = ["dense", "magnitude, schedule", "corrected, static, distilled"]
    command = [*places, *options, "--runs", *runs, "--learning-rates", "1e-2"]
    pretrained.main(command)
    pretrained.main(command)
    pretrained.main([*command[:-1], "2e-2", "--runs", "dense"])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(line["run"], line["lr"]) for line in lines] == [(run, 1e-2) for run in runs] + [("dense", 2e-2)]
    assert [line["density"] for line in lines] == pytest.approx([1.0, 0.5, 0.5, 1.0], abs=0.01)
    dense, scheduled, corrected, again = (line["at the cut"] for line in lines)
    assert dense == again == pytest.approx(scheduled)  # which starts dense
    assert corrected != dense
    assert all(line["after"] != line["at the cut"] and line["peak bytes"] > 0 for line in lines)
    assert len(capsys.readouterr().out.splitlines()) >= 4

    # Another teacher makes another run.
    teacher = str(tmp_path / "teacher")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(places[0])).save_pretrained(teacher)
    pretrained.main([*command, "--runs", "corrected, static, distilled", "--teacher", teacher])
    *before, taught = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert before == lines
    assert taught["at the cut"] == pytest.approx(corrected)
    assert taught["after"] != lines[2]["after"]


@pytest.mark.parametrize("name", ["denser", "activation, fast", "dense, static"])
def test_a_run_that_is_none_is_named(places, tmp_path, name, capsys):
    with pytest.raises(SystemExit):
        pretrained.parse([*places, "--json", str(tmp_path / "out.jsonl"), "--runs", name])
    assert name in capsys.readouterr().err


@pytest.mark.usefixtures("threads")
def test_steps(places, tmp_path, monkeypatch):
    options = ["--densities", "0.5", "--window", "8", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark", places[0], *options, "--json", str(tmp_path / "out.json")])
    pretrained_step.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["dense", "LoRA", "density 0.5"] * 2
    assert all(row["seconds"] > 0 and row["state"] < 1 for row in rows if row["run"] != "dense")
