import json


def test_plot(tmp_path, run, run_json):
    history = [{"step": 1, "topkast/mask_churn": 0.3, "loss": 2.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert "wrote" in run("plot", tmp_path, "--output", tmp_path / "churn.png")
    assert (tmp_path / "churn.png").stat().st_size > 1000
    told = run_json("plot", tmp_path, "--metric", "loss", "--output", tmp_path / "loss.svg")
    assert told["metric"] == "loss" and (tmp_path / "loss.svg").read_text().startswith("<?xml")


def test_bad_input(tmp_path, refused):
    assert "holds no trainer_state.json" in refused("plot", tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    assert "It has: loss." in refused("plot", tmp_path, "--output", tmp_path / "out.png")
