"""That every benchmark runs, on tiny sizes, and writes what it promises. What it measures is not looked at."""

import json
import sys

import pytest
import torch

from benchmarks import generate, kernels, measure, memory, scaling, step_time


TINY = ["--width", "16", "--layers", "1", "--vocabulary", "16"]
RUNS = {
    memory: [*TINY, "--context", "8"],
    scaling: ["--plan"],  # the measurement starts many processes
    generate: [*TINY, "--new-tokens", "2", "--rounds", "1"],
    step_time: [*TINY, "--bf16", "--rounds", "1", "--batch", "1", "--context", "8", "--block-size", "4", "1"],
    kernels: ["--shapes", "8x16", "--tokens", "3", "--densities", "0.5", "--rounds", "1", "--block-size", "4", "1"],
}


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


def test_crossover_lies_where_the_ratios_pass_one():
    crossover = pytest.importorskip("benchmarks.crossover", exc_type=ImportError)
    grid = crossover.DENSITIES
    assert crossover.crossover([2.0] * len(grid)) == 1
    assert crossover.crossover([0.9] * len(grid)) == 0
    assert crossover.crossover([1.5, 1.5, 0.5, *[0.1] * (len(grid) - 3)]) == pytest.approx((grid[1] + grid[2]) / 2)
