"""The runner, fast ones with a program in the place of run_clm.py; at the end real trainings, killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import arguments
import pytest
import run_clm
import sweep as sweep_module
import sweep_runs
from sweep import main
from sweep_plan import read_sweep
from sweep_runs import refuse_other_settings, start


RECIPES = Path(arguments.__file__).parent
PAPER = RECIPES / "paper"

# Writes results that are better the nearer the rate is to 0.002; says when and how it was started.
PRETENDED = """
import json, pathlib, sys, time, yaml
settings = yaml.safe_load(open(sys.argv[1]))
folder = pathlib.Path(settings["output_dir"])
with open(folder / "starts", "a") as starts:
    starts.write(" ".join(sys.argv[2:]) + "\\n")
time.sleep(settings["warmup_steps"])
if settings["window"] == 13:
    sys.exit("thirteen brings bad luck")
(folder / "checkpoint-5").mkdir(exist_ok=True)
(folder / "model.safetensors").write_text("weights")
score = 1 + abs(settings["learning_rate"] - 0.002) * 100 + settings["seed"] / 10
results = {"valid_bits_per_byte": score, "test_bits_per_byte": score + 1, "density": 0.2, "backward_density": 0.4}
results |= {"nonzero_parameters": 10, "peak_state_bytes": 1e6, "training_flops": 1e9, "train_seconds": 3.0, "steps": 5}
results |= {"tokens": 100, "device": "pretended", "git_commit": None, "seed": settings["seed"]}
history = [{"loss": score + 1 / step, "step": step} for step in range(1, 31)]
(folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
(folder / "results.tmp").write_text(json.dumps(results))
(folder / "results.tmp").rename(folder / "results.json")
"""


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    """Writes a sweep file whose runs are pretended ones."""
    (tmp_path / "pretended.py").write_text(PRETENDED)
    monkeypatch.setattr(sweep_runs, "SCRIPT", tmp_path / "pretended.py")
    monkeypatch.setattr(sweep_module, "POLL_SECONDS", 0.02)

    def write(text):
        head = f"output_dir: {tmp_path}/out\nsettings: {{use_cpu: true, warmup_steps: 0, window: 8}}\n"
        (tmp_path / "sweep.yaml").write_text(head + textwrap.dedent(text))
        return str(tmp_path / "sweep.yaml")

    return write


def starts(folder):
    """What the runs below a folder were started with, by their place."""
    return {str(path.parent.relative_to(folder)): path.read_text() for path in folder.rglob("starts")}


def table(folder, name="table"):
    with (folder / f"{name}.csv").open() as file:
        return {line["row"]: line for line in csv.DictReader(file)}


TWO_ROWS = """
    seeds: [0, 1, 2]
    rows:
      dense: {sparse: false, learning_rate: [1e-3, 2e-3, 4e-3]}
      80/60: {learning_rate: [4e-3, 8e-3]}
"""


def test_runs_all_values_then_other_seeds_and_collects_them(sweep_file, tmp_path, capsys):
    assert main([sweep_file(TWO_ROWS), "--jobs", "2"]) == 0
    out = tmp_path / "out"
    expected = {f"dense/learning_rate-{value}/seed-0" for value in (0.001, 0.002, 0.004)}
    expected |= {f"80-60/learning_rate-{value}/seed-0" for value in (0.004, 0.008)}
    best = ("dense/learning_rate-0.002", "80-60/learning_rate-0.004")
    expected |= {f"{row}/seed-{seed}" for row in best for seed in (1, 2)}
    assert starts(out) == dict.fromkeys(expected, "\n")

    rows = table(out)
    assert float(rows["dense"]["learning_rate"]) == 0.002 and rows["dense"]["edge"] == "False"
    assert float(rows["dense"]["valid_mean"]) == pytest.approx(1.1)
    assert float(rows["dense"]["test_std"]) == pytest.approx(0.1)
    assert float(rows["80/60"]["gap_to_dense"]) == pytest.approx(0.2)
    assert rows["80/60"]["edge"] == "True"
    text = (out / "table.md").read_text()
    assert "| dense | 0.002 | 1.1000 ± 0.1000 | 2.1000 ± 0.1000 | 3 | +0.0000 | 10 | 1.0 MB | 1e+09 | 3 |" in text
    assert "| 80/60 | 0.008 | 0 | 1.6000 | 2.6000 | 1e+09 | 3 |" in text, "the neighbours are there too"
    assert len((out / "runs.csv").read_text().splitlines()) == 1 + 9
    assert all((out / f"{name}.png").exists() for name in ("metric_by_density", "gap_to_dense", "loss_to_dense"))

    printed = capsys.readouterr().out
    assert "[9/9] " in printed and "dense, learning_rate 0.002, seed 2: bits_per_byte valid 1.2000" in printed
    assert printed.splitlines()[-1].endswith("add a value beyond it: 80/60 (0.004)")


def test_no_gap_between_rows_that_count_in_other_units(sweep_file, tmp_path):
    path = sweep_file("grid: {learning_rate: [2e-3]}\nrows: {dense: {sparse: false}, a: {}, b: {}}")
    assert main([path]) == 0
    results = tmp_path / "out" / "b" / "learning_rate-0.002" / "seed-0" / "results.json"
    results.write_text(results.read_text().replace("bits_per_byte", "word_perplexity"))
    assert main([path]) == 0
    assert [line["gap_to_dense"] for line in table(tmp_path / "out").values()] == ["0.0", "0.0", ""]


def test_finished_runs_never_run_again_and_weigh_nothing(sweep_file, tmp_path):
    path = sweep_file(TWO_ROWS)
    main([path])
    before = starts(tmp_path / "out")
    assert main([path]) == 0
    assert starts(tmp_path / "out") == before
    assert not list((tmp_path / "out").rglob("*.safetensors")) and not list((tmp_path / "out").rglob("checkpoint-*"))


def test_models_stay_if_asked_for(sweep_file, tmp_path):
    main([sweep_file("rows: {a: {learning_rate: 1e-3}}\nkeep_models: true")])
    for pattern in ("*.safetensors", "checkpoint-*"):
        assert len(list((tmp_path / "out").rglob(pattern))) == 1


def test_a_failed_run_is_reported_others_go_on_and_it_is_tried_again(sweep_file, tmp_path, capsys):
    rows = "rows: {bad: {window: 13, learning_rate: [1e-3, 2e-3]}, good: {learning_rate: 2e-3}}"
    assert main([sweep_file(rows)]) == 1
    printed = capsys.readouterr().out
    assert "bad, learning_rate 0.001, seed 0: FAILED, exit status 1" in printed
    assert "    thirteen brings bad luck" in printed and "2 run(s) failed" in printed
    rows = table(tmp_path / "out")
    assert rows["good"]["runs_done"] == "1" and rows["bad"]["runs_failed"] == "2"
    assert "| bad |  | 0 of 2 runs, 2 failed |" in (tmp_path / "out" / "table.md").read_text()
    assert main([str(tmp_path / "sweep.yaml")]) == 1
    assert set(starts(tmp_path / "out").values()) == {"\n\n", "\n"}


def test_a_half_run_resumes(sweep_file, tmp_path):
    path = sweep_file("rows: {a: {learning_rate: 1e-3}}")
    folder = tmp_path / "out" / "a" / "learning_rate-0.001" / "seed-0"
    (folder / "checkpoint-7").mkdir(parents=True)
    main([path])
    assert starts(folder) == {".": "\n"}, "that checkpoint is not whole"
    (folder / "results.json").unlink()
    (folder / "checkpoint-7").mkdir(exist_ok=True)
    (folder / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": 7}')
    main([path])
    assert starts(folder) == {".": "\n--resume\n"}


def test_results_of_other_settings_are_an_error_before_anything_runs(sweep_file, tmp_path):
    main([sweep_file("rows: {a: {learning_rate: 1e-3}}")])
    path = sweep_file("rows: {new: {learning_rate: 1e-3}, a: {learning_rate: 1e-3, density: 0.1}}")
    with pytest.raises(ValueError, match=r"a/learning_rate-0.001/seed-0` .*`density` was None, is 0.1.*Remove"):
        main([path])
    assert len(starts(tmp_path / "out")) == 1
    assert main([path, "--set", f"output_dir={tmp_path}/other"]) == 0


def test_results_of_another_version_are_an_error_before_anything_runs(sweep_file, tmp_path):
    assert main([sweep_file(TWO_ROWS)]) == 0
    path = tmp_path / "out" / "dense" / "learning_rate-0.002" / "seed-1" / "results.json"
    results = json.loads(path.read_text())
    del results["training_flops"]
    path.write_text(json.dumps(results))
    before = starts(tmp_path / "out")
    with pytest.raises(ValueError, match="results.json` has no `training_flops`.*Delete its folder"):
        main([sweep_file(TWO_ROWS)])
    assert starts(tmp_path / "out") == before


def test_a_moved_sweep_goes_on(sweep_file, tmp_path):
    path = sweep_file("rows: {a: {learning_rate: [1e-3, 2e-3]}}")
    main([path])
    (tmp_path / "out").rename(tmp_path / "moved")
    assert main([path, "--set", f"output_dir={tmp_path}/moved"]) == 0
    assert set(starts(tmp_path / "moved").values()) == {"\n"}


def test_only_some_rows(sweep_file, tmp_path):
    path = sweep_file(TWO_ROWS)
    assert main([path, "--only", "^80"]) == 0
    assert {Path(place).parts[0] for place in starts(tmp_path / "out")} == {"80-60"}
    assert "| dense |  | 0 of 5 runs |" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(ValueError, match=r"--only nothing: .*dense, 80/60"):
        main([path, "--only", "nothing"])


def test_only_takes_a_regular_expression(sweep_file, capsys):
    with pytest.raises(SystemExit):
        main([sweep_file(TWO_ROWS), "--only", "80/60 ("])
    assert "--only 80/60 (: not a regular expression" in capsys.readouterr().err


def test_dry_run_lists_and_runs_nothing(sweep_file, tmp_path, capsys):
    sizes = "n_layer: 1, n_embd: 8, n_head: 2, n_inner: 32"
    fields = f"max_steps: 10, per_device_train_batch_size: 2, config_overrides: {{{sizes}}}"
    path = sweep_file(f"rows: {{dense: {{sparse: false, {fields}}}, a: {{density: 0.25, {fields}}}}}\nseeds: [0, 1]")
    assert main([path, "--dry-run"]) == 0
    assert not starts(tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    tokens, projections, head = 10 * 2 * 8, 12 * 8**2, 8 * 256
    assert [line.split()[0] for line in lines[:4]] == ["to", "later", "to", "later"]
    assert float(lines[0].split()[2]) == pytest.approx(6 * tokens * (projections + head), rel=1e-2)
    assert float(lines[2].split()[2]) == pytest.approx(tokens * (2 * projections + 6 * head), rel=1e-2)
    assert lines[-1].startswith("0 of 4 runs done")


def test_a_run_that_outlives_its_runner_is_not_run_twice(sweep_file, tmp_path):
    path = sweep_file("rows: {a: {learning_rate: 1e-3, warmup_steps: 60}}")
    sweep = read_sweep(path)
    (run,) = sweep.first_runs(sweep.rows[0])
    child = start(run, threads=1)
    try:
        assert start(run, threads=1) is None, "nothing here holds the lock but the run itself"
        other = read_sweep(path, {"density": 0.5})
        with pytest.raises(ValueError, match="`density` was None, is 0.5"):
            refuse_other_settings(other.first_runs(other.rows[0])[0])
    finally:
        child.process.kill()
        child.process.wait()
    again = start(run, threads=1)
    again.process.kill()
    again.process.wait()


def test_waits_for_the_run_of_another_process(sweep_file, tmp_path, capsys):
    path = sweep_file("rows: {a: {learning_rate: 1e-3, warmup_steps: 1}}")
    sweep = read_sweep(path)
    child = start(sweep.first_runs(sweep.rows[0])[0], threads=1)
    assert main([path]) == 0
    child.process.wait()
    assert list(starts(tmp_path / "out").values()) == ["\n"]
    printed = capsys.readouterr().out
    assert "is run by another process: waiting" in printed and "by another process\n" in printed


def smoke(output_dir, *options):
    """A runner of real trainings, as a process in a group of its own."""
    command = [sys.executable, str(RECIPES / "sweep.py"), str(PAPER / "rivals_smoke.yaml"), "--jobs", "2"]
    command += ["--set", f"output_dir={output_dir}", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_runner_loses_no_finished_run_and_runs_none_twice(tmp_path):
    """The first time the runner is killed, and its runs go on; the second time a run is killed after a checkpoint."""
    options = ["--only", "^dense|^(static|rigl), density 0.2", "--set", "max_steps=300", "--set", "save_steps=20"]
    first = smoke(tmp_path, *options)
    wait_for(lambda: list(tmp_path.rglob("checkpoint-20/trainer_state.json")))
    first.send_signal(signal.SIGKILL)
    first.wait()
    running = [path.parent for path in tmp_path.rglob("log.txt")]

    second = smoke(tmp_path, *options)
    last = tmp_path / "rigl-density-0.2" / "learning_rate-0.004" / "seed-0"
    wait_for(lambda: list(last.glob("checkpoint-*/trainer_state.json")))
    pid = next(
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and str(last / "config.yaml") in command_of(path)
    )
    os.kill(pid, signal.SIGKILL)
    printed, _ = second.communicate()
    assert second.returncode == 1, printed
    assert "rigl, density 0.2, learning_rate 0.004, seed 0: FAILED, killed by signal 9" in printed
    for folder in running:
        assert (folder / "results.json").exists() and (folder / "log.txt").read_text().count("--- ") == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert len(before) == 2

    third = smoke(tmp_path, *options)
    printed, _ = third.communicate()
    assert third.returncode == 0, printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (last / "log.txt").read_text().count("--resume") == 1
    results = json.loads((last / "results.json").read_text())
    assert results["steps"] == 300 and results["tokens"] == 300 * 4 * 64
    steps = [json.loads(line)["step"] for line in (last / "topkast_layers.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[:2] == [0, 5]


def command_of(process):
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:  # it has ended meanwhile
        return ""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["^[ds]", "^[^ds]"])
def test_every_method_trains_refreshes_saves_resumes_and_is_measured(tmp_path, part):
    """All rows to step 12; then results and the last checkpoints are taken away, and the runs resume from step 5."""
    options = ["--only", part, "--set", "grid={density: [0.2]}"]
    options += ["--set", "keep_models=true", "--set", "save_total_limit=5"]
    runner = smoke(tmp_path, *options)
    printed, _ = runner.communicate()
    assert runner.returncode == 0, printed
    folders = [path.parent for path in tmp_path.rglob("results.json")]
    assert len(folders) == 7
    unbroken = {}
    for folder in folders:
        unbroken[folder] = json.loads((folder / "results.json").read_text())
        (folder / "results.json").unlink()
        for name in ("checkpoint-10", "checkpoint-12"):
            (folder / name / "trainer_state.json").unlink()
    for folder, expected in unbroken.items():
        resumed = run_clm.main([str(folder / "config.yaml"), "--resume"])
        for key in ("valid_bits_per_byte", "test_bits_per_byte", "density", "training_flops"):
            assert resumed[key] == expected[key], (folder.parts[-3], key)
