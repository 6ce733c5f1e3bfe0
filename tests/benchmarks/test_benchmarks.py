"""That every benchmark runs, on tiny sizes, and writes what it promises. What it measures is not looked at."""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    experts,
    fine_tuning,
    generate,
    inspect_files,
    kernels,
    largest,
    measure,
    memory,
    peers,
    refresh,
    scaling,
    step_time,
    training,
)
from hf_topkast.native import extension


pytestmark = pytest.mark.usefixtures("threads")  # benchmarks set their number

TINY = ["--width", "16", "--layers", "1", "--vocabulary", "16"]
RUNS = {
    largest: ["--width", "16", "--vocabulary", "16", "--context", "8", "--batch", "1", "--mib", "1"],
    memory: [*TINY, "--context", "8"],
    peers: ["--shapes", "8x16", "--tokens", "3", "--densities", "0.5", "--peers", "hf_topkast", "torch.sparse"],
    inspect_files: ["--gigabytes", "0.001", "--rounds", "1"],
    scaling: ["--plan"],  # the measurement starts many processes
    generate: [
        *(*TINY, "--new-tokens", "2", "--rounds", "1", "--densities", "0.2/0.4", "0.5"),
        *("--dtypes", "float32", "bfloat16", "--batches", "1", "2"),
    ],
    refresh: ["--shapes", "8x16", "--rounds", "1", "--block-size", "4", "1"],
    step_time: [*TINY, "--bf16", "--rounds", "1", "--batch", "1", "--context", "8", "--block-size", "4", "1"],
    kernels: ["--shapes", "8x16", "--tokens", "3", "--densities", "0.5", "--rounds", "1", "--block-size", "4", "1"],
}


if extension is None:  # two sides that are the same
    del RUNS[refresh]


@pytest.mark.parametrize("module", RUNS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_runs_and_writes(module, tmp_path, monkeypatch, capsys):
    written = {option: tmp_path / name for option, name in (("--json", "out.json"), ("--plot", "out.png"))}
    options = [str(part) for item in written.items() for part in item]
    monkeypatch.setattr(sys, "argv", ["benchmark", *RUNS[module], "--threads", "1", *options])
    module.main()
    result = json.loads(written["--json"].read_text())
    assert result["machine"]["torch"] and result["rows"]
    assert written["--plot"].read_bytes().startswith(b"\x89PNG")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(result["rows"])


@pytest.mark.parametrize("measure", experts.MEASURES)
def test_experts(measure, tmp_path, monkeypatch):
    if measure == "refresh" and not Path("/proc/self/clear_refs").exists():
        pytest.skip("it asks Linux how large the process is")
    sizes = ["--shapes", "4,8,16,2,6", "--settings", "0.3/0.5", "--layers", "1", "--new-tokens", "2"]
    options = ["--gigabytes", "0.0001", "--rounds", "1", "--threads", "1", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark", measure, *sizes, *options])
    experts.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows and all(row["density / backward"] == "0.3 / 0.5" for row in rows)
    assert all(math.isfinite(row[bar]) for row in rows for bar in experts.MEASURES[measure][1])


def test_interleaved_pairs():
    order = []
    seconds = measure.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert order == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert measure.median_ratio([2, 4, 30], [1, 1, 10]) == 3
    order.clear()
    measure.interleaved({"a": lambda: order.append("a")}, rounds=2, calls=3)
    assert len(order) == 1 + 2 * 3


def test_a_model_by_name_sets_the_sizes_and_later_options_change_them():
    parser = measure.make_parser("")
    measure.add_model(parser, layers=1, width=2, vocabulary=3, context=4, batch=5)
    chosen = parser.parse_args(["--model", "1B", "--context", "512"])
    assert (chosen.layers, chosen.width, chosen.context, chosen.batch) == (18, 2048, 512, 5)
    assert vars(parser.parse_args([]))["layers"] == 1


@pytest.mark.parametrize(("name", "size"), [("gpt2-small", 124e6), ("350M", 355e6), ("1B", 1.01e9)])
def test_models_have_the_sizes_of_their_names(name, size):
    shape = measure.MODELS[name]
    with torch.device("meta"):
        model = measure.make_gpt2(shape["layers"], shape["width"], shape["context"], shape["vocabulary"])
    assert model.num_parameters() == pytest.approx(size, rel=0.01)


def test_fine_tuning_of_a_byte_model(tmp_path, monkeypatch, capsys):
    measure.make_gpt2(layers=1, width=16, positions=16, vocabulary=256).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_bytes(bytes(range(256)) * 4)
    options = ["--steps", "4", "--window", "16", "--batch-size", "2", "--learning-rates", "1e-2", "--threads", "1"]
    places = [str(tmp_path / name) for name in ("model", "text", "text")]
    monkeypatch.setattr(sys, "argv", ["benchmark", *places, *options, "--json", str(tmp_path / "out.json")])
    fine_tuning.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["run"] for row in rows] == list(fine_tuning.variants(0.2))
    assert [round(row["density at the end"], 1) for row in rows] == [1.0] + [0.2] * (len(rows) - 1)
    assert rows[0]["before"] == rows[0]["at the first step"] == rows[2]["at the first step"]  # cubic starts dense


def test_the_largest_depth_is_tried_and_lowered_until_it_fits():
    tried = []

    def used(layers, bend):
        tried.append(layers)
        return 10.0 + 2 * layers + (bend if layers > 4 else 0)

    assert largest.largest_depth(lambda layers: used(layers, 0), 1000) == (495, 1000)
    assert tried == [2, 4, 495]
    tried.clear()  # now with more than the first two depths foretell: 1,020 and 1,002, then 984
    assert largest.largest_depth(lambda layers: used(layers, 20), 1000) == (477, 984)
    assert tried == [2, 4, 495, 486, 477]
    with pytest.raises(ValueError, match="smaller width"):
        largest.largest_depth(lambda layers: math.inf if layers > 2 else 1.0, 1000)


def test_the_search_needs_a_limit_and_no_depth(monkeypatch, capsys):
    for options, message in ((["--width", "8"], "--mib 1000"), (["--mib", "1", "--layers", "3"], "leave it out")):
        monkeypatch.setattr(sys, "argv", ["benchmark", *options])
        with pytest.raises(SystemExit):
            largest.main()
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_training_runs_recipes_and_leaves_out_what_fails(tmp_path, monkeypatch, capfd):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} squared is {number**2}.\n" for number in range(9000)))
    places = ["--data-file", str(text), "--folder", str(tmp_path), "--recipes", "recipes/enwik8/cpu"]
    sizes = ["--steps", "2", "--eval-bytes", "1000", "--threads", "1", "--runs", "topkast_80_60:16", "missing"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *places, *sizes, "--json", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="1 of 2 runs"):
        training.main()
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["run"] == "topkast_80_60:16" and row["steps"] == 2 and row["valid"] > 0
    assert "missing: left out (1)" in capfd.readouterr().err


def test_training_gives_up_a_run_and_what_it_launched(tmp_path, monkeypatch, capsys):
    mark = tmp_path / "alive"
    late = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {late!r}])"
    monkeypatch.setattr(training, "command", lambda *_: [sys.executable, "-c", launcher])
    assert training.train("dense", argparse.Namespace(folder=tmp_path, limit=0.5)) is None
    assert "more than 0.5 seconds" in capsys.readouterr().err
    time.sleep(2)
    assert not mark.exists()
