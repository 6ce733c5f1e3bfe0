import json
import random

import pytest

from hf_topkast.cli.train import configurations, find_config, recipes_folder


SETTINGS = {
    "config_overrides": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_inner": 32},
    "dataset": "text",
    "window": 16,
    "max_eval_bytes": 100,
    "density": 0.25,
    "refresh_every": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "sample_tokens": 0,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


@pytest.fixture
def config(tmp_path):
    choose = random.Random(0).choice
    lines = [" ".join(choose(["sparse", "dense", "layer"]) for _ in range(6)) for _ in range(100)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    places = {
        "data_file": str(tmp_path / "text.txt"),
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(SETTINGS | places))
    return tmp_path / "config.yaml"


def test_trains_and_the_command_line_wins(config, run_json):
    results = run_json("train", config, "--max_steps", "3", "--density=0.5")
    assert results["steps"] == 3 and results["density"] == 0.5
    assert json.loads((config.parent / "out" / "results.json").read_text()) == results


def test_the_page_of_the_run(config, run, run_json):
    assert "bits_per_byte: valid" in run("train", config)
    page = config.parent / "page.html"
    (told,) = run_json("report", config.parent / "out", "--output", page)["runs"]
    assert told["layer_entries"] == 3 and told["steps"] == 2
    assert "Density by layer" in page.read_text() and "Churn by layer" in page.read_text()


def test_what_came_with_the_package(run_json, run):
    told = run_json("train", "--list")
    assert told["configurations"] == configurations()
    assert "enwik8/demo" in configurations() and "finetune/chat" in configurations()
    assert not any(name.startswith(("accelerate", "paper")) for name in configurations())
    assert "enwik8/cpu/topkast_80_60" in run("train", "--list")
    for name in configurations():
        folder = recipes_folder()
        assert find_config(name) == find_config(f"recipes/{name}.yaml").resolve() == folder / f"{name}.yaml"


def test_fields(run):
    with pytest.raises(SystemExit) as stop:
        run("train", "--fields")
    assert stop.value.code == 0


def test_bad_input(config, refused, tmp_path):
    assert "needs a configuration" in refused("train")
    assert "no file nothing.yaml" in refused("train", "nothing.yaml")
    assert "Give the configuration first" in refused("train", "--max_steps", "3", config)
    assert "did you mean max_steps" in refused("train", config, "--max_stps", "3")
    assert "density=2.0" in refused("train", config, "--density", "2")
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "is not YAML" in refused("train", tmp_path / "bad.yaml")


def test_a_value_of_the_wrong_type(config, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("train", config, "--max_steps", "many")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "invalid int value: 'many'" in said and said.count("\n") == 2
