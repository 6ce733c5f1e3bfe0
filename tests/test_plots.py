import json

import pytest

from hf_topkast.plots import plot_metric, read_metric


@pytest.fixture
def run(tmp_path):
    history = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.5, "topkast/mask_churn": 0.3},
        {"step": 4, "topkast/mask_churn": 0.1},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return tmp_path


def test_read(run):
    assert read_metric(run, "topkast/mask_churn") == ([2, 4], [0.3, 0.1])


def test_plot_writes_an_image(run):
    plot_metric({"80/60": run}, "topkast/mask_churn", run / "churn.png")
    assert (run / "churn.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(run, tmp_path):
    with pytest.raises(ValueError, match="no values of 'accuracy'. It has: loss, step, topkast/mask_churn"):
        read_metric(run, "accuracy")
    with pytest.raises(ValueError, match="nowhere.*does not exist.*output_dir"):
        read_metric(tmp_path / "nowhere", "loss")
