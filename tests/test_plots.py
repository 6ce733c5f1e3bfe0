import importlib.util
import json

import pytest

from hf_topkast.plots import plot_metric


HISTORY = [
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 2.5, "topkast/mask_churn": 0.3},
    {"step": 4, "topkast/mask_churn": 0.1},
]


def written(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What stands in the figure: points by label."""
    from matplotlib.axes import Axes

    curves = {}
    plot = Axes.plot

    def note(axes, xs, ys, label):
        curves[label] = (xs, ys)
        return plot(axes, xs, ys, label=label)

    monkeypatch.setattr(Axes, "plot", note)
    return curves


def test_an_image_with_a_curve_for_each_run(tmp_path, drawn):
    plot_metric([written(tmp_path / "80-60")], "topkast/mask_churn", tmp_path / "churn.png")
    assert (tmp_path / "churn.png").read_bytes().startswith(b"\x89PNG")
    assert drawn == {"80-60": ((2, 4), (0.3, 0.1))}


def test_a_trainer_that_left_its_log_in_a_checkpoint_only(tmp_path, drawn):
    written(tmp_path / "run" / "checkpoint-4")
    plot_metric([tmp_path / "run"], "loss", tmp_path / "loss.png")
    assert drawn == {"run": ((1, 2), (3.0, 2.5))}


def test_runs_of_one_name_stay_apart(tmp_path, drawn):
    runs = [written(tmp_path / side / "checkpoint-4") for side in ("dense", "sparse")]
    plot_metric(runs, "loss", tmp_path / "loss.png")
    assert list(drawn) == [str(run) for run in runs]


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"logged no values of 'accuracy'. It has: loss, topkast/mask_churn"):
        plot_metric([written(tmp_path / "run")], "accuracy", tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"no directory .*nowhere.*output_dir"):
        plot_metric([tmp_path / "nowhere"], "loss", tmp_path / "out.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'hf-topkast\[recipes\]'"):
        plot_metric([tmp_path / "run"], "loss", tmp_path / "out.png")
