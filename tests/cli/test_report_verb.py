import json


def test_report(tmp_path, run, run_json):
    for name, density in (("dense", None), ("sparse", 0.2)):
        (tmp_path / name).mkdir()
        history = [{"step": step, "loss": 3 - step / 10} for step in range(1, 9)]
        if density:
            history = [{**entry, "topkast/density": density} for entry in history]
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    output = tmp_path / "both.html"
    told = run_json("report", tmp_path / "dense", tmp_path / "sparse", "--output", output)
    assert [each["density"] for each in told["runs"]] == [1.0, 0.2]
    assert "wrote" in run("report", tmp_path / "dense", "--output", output)


def test_bad_input(tmp_path, refused):
    assert "holds no trainer_state.json" in refused("report", tmp_path)
    assert "There is no directory" in refused("report", tmp_path / "nowhere")
    (tmp_path / "trainer_state.json").write_text("{")
    assert "is damaged" in refused("report", tmp_path)


def test_json_of_a_run_that_diverged(tmp_path, run):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": NaN}]}')

    def refuse(word):
        raise ValueError(f"JSON has no {word}")

    told = json.loads(run("report", tmp_path, "--output", tmp_path / "a.html", "--json"), parse_constant=refuse)
    assert told["runs"][0]["loss"] is None and told["runs"][0]["density"] == 1.0
