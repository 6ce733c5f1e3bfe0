import json

import pytest

from hf_topkast.layer_log import append_entry
from hf_topkast.runs import read_run
from hf_topkast.runs.page import page
from hf_topkast.runs.table import outcome_rows


@pytest.fixture
def folder(tmp_path):
    history = [
        {"step": 1, "loss": 3.0, "topkast/density": 0.5, "note": "text"},
        {"step": 2, "loss": 2.5, "topkast/density": 0.4, "topkast/backward_density": 0.8},
        {"step": 2, "train_runtime": 7.5},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return tmp_path


def test_of_trainer_alone(folder):
    run = read_run(folder)
    assert run.series("loss") == [(1, 3.0), (2, 2.5)] and run.series("note") == []
    assert (run.last("loss"), run.last("grad_norm")) == (2.5, None)
    assert run.sparse and (run.density, run.backward_density) == (0.4, 0.8)
    assert (run.steps, run.seconds, run.layers) == (2, 7.5, [])


def test_results_count_before_the_log(folder):
    (folder / "results.json").write_text(json.dumps({"density": 0.2, "train_seconds": 9, "steps": 5, "loss": 1.5}))
    append_entry(folder, 2, {"a": {"density": 0.2}})
    run = read_run(folder)
    assert (run.density, run.seconds, run.steps, run.last("loss")) == (0.2, 9, 5, 1.5)
    assert run.to_dict()["layer_entries"] == 1
    json.dumps(run.to_dict())


def test_a_run_that_still_goes_on_is_read_from_its_last_checkpoint(tmp_path):
    for step in (9, 10):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        (place / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    (place / "topkast_config.json").write_text('{"density": 0.1}')
    run = read_run(tmp_path)
    assert run.steps == 10 and run.settings == {"density": 0.1} and run.density == 0.1


PRUNED = {"density": "nonzero", "backward_density": None}


@pytest.mark.parametrize("settings", [PRUNED, {"method": "topkast"}], ids=str)
def test_densities_that_nothing_tells(tmp_path, settings):
    """Of a pruned model, say, that Trainer alone has trained, or before the first entry of the log."""
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    (tmp_path / "topkast_config.json").write_text(json.dumps(settings))
    run = read_run(tmp_path)
    assert run.sparse and run.density is None and run.backward_density is None
    assert "Density" not in page([run]) and "density" not in dict(outcome_rows([run]))


def test_a_dense_run(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    assert not read_run(tmp_path).sparse and read_run(tmp_path).density == 1


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: give the output_dir"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no trainer_state.json"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"trainer_state.json is damaged"):
        read_run(tmp_path)
