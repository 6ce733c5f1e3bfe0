import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import Run, launch
from toy_training import make_trainer, same_weights
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_topkast import CheckpointError
from hf_topkast.checkpoints.durable import last_whole_checkpoint, replacing
from hf_topkast.storage.reservoir import put_to_rest


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}


def test_replacing_waits_for_the_disk(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    path = tmp_path / "file"
    names = {path.parent.stat().st_ino: "folder"}

    def note(handle):
        events.append(f"{names[os.fstat(handle).st_ino]} on disk")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda *names: events.append("renamed") or replace(*names))
    with replacing(path) as temporary:
        temporary.write_text("new")
        names[temporary.stat().st_ino] = "file"
    assert events == ["file on disk", "renamed", "folder on disk"]


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise OSError("full")
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_checkpoint_is_on_disk_before_training_goes_on(tmp_path, monkeypatch):
    flushed, missing, fsync = {}, [], os.fsync

    def note(handle):
        status = os.fstat(handle)
        flushed[status.st_ino] = status.st_mtime_ns
        fsync(handle)

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            checkpoint = tmp_path / f"checkpoint-{state.global_step}"
            paths = [tmp_path, checkpoint, *checkpoint.iterdir()]
            missing.extend(path for path in paths if flushed.get(path.stat().st_ino) != path.stat().st_mtime_ns)

    monkeypatch.setattr(os, "fsync", note)
    make_trainer(tmp_path, callbacks=[Look()], save_total_limit=1, **SAVING).train()
    assert flushed and not missing


@pytest.mark.parametrize("left", [None, "", '{"epoch": 1.0, "global_'])
def test_half_written_checkpoint_is_passed_over(tmp_path, monkeypatch, left):
    straight = make_trainer(tmp_path, **SAVING)
    straight.train()
    state = tmp_path / "checkpoint-8" / "trainer_state.json"
    state.unlink() if left is None else state.write_text(left)
    warnings = []
    monkeypatch.setattr("hf_topkast.checkpoints.durable.logger.warning", warnings.append)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert "checkpoint-8 is incomplete" in warnings[0]
    steps = Steps()
    resumed = make_trainer(tmp_path, callbacks=[steps], **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert steps.done == [7, 8]
    assert same_weights(straight.model, resumed.model)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


def test_no_whole_checkpoint_is_an_error(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(CheckpointError, match="no whole checkpoint.*leave resume_from_checkpoint out"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_checkpoint_that_is_written_over_counts_as_a_part(tmp_path, monkeypatch):
    make_trainer(tmp_path, **SAVING).train()
    again = make_trainer(tmp_path, **{**SAVING, "max_steps": 4})
    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", lambda directory: [][0])  # as a kill would
    with pytest.raises(IndexError):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not (tmp_path / "checkpoint-4" / "trainer_state.json").exists()


class Steps(TrainerCallback):
    """Writes down the optimizer steps of a run."""

    def __init__(self):
        self.done = []

    def on_step_end(self, args, state, control, **kwargs):
        self.done.append(state.global_step)


class Break(TrainerCallback):
    """Calls a function after an optimizer step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


@pytest.mark.parametrize("where", ["transformer.h.0.attn.c_attn.values", "transformer.ln_f.weight"])
def test_nan_is_not_saved(tmp_path, where):
    def diverge(model):
        model.get_parameter(where).data[3] = torch.nan

    trainer = make_trainer(tmp_path, save_total_limit=1, callbacks=[Break(4, diverge)], **SAVING)
    with pytest.raises(CheckpointError, match=rf"'{where}' holds NaN.*step 4.*diverged.*last good.*checkpoint-2"):
        trainer.train()
    make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)


FULL_DISK = """
import os, resource, signal, sys
from test_durable import Break, SAVING, make_trainer

def fill(model):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # no file may become larger

make_trainer(sys.argv[1], callbacks=[Break(6, fill)], **SAVING).train()
"""


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_full_disk_names_the_last_good_checkpoint(tmp_path):
    broken = run(FULL_DISK, tmp_path)
    assert broken.returncode != 0
    assert "checkpoint-6 is not written" in broken.stderr
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-4'}" in broken.stderr
    straight, resumed = make_trainer(tmp_path / "straight", **SAVING), make_trainer(tmp_path, **SAVING)
    straight.train()
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(straight.model, resumed.model)


FULL_RESERVOIR_DISK = """
import resource, signal, torch
from hf_topkast.storage.reservoir import put_to_rest
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
put_to_rest(torch.zeros(10_000), "disk")
"""


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space on disk")
def test_reservoir_without_room_is_an_error_and_no_crash():
    broken = run(FULL_RESERVOIR_DISK)
    assert broken.returncode == 1
    assert "no room for a reservoir of 40000 bytes" in broken.stderr and "TMPDIR" in broken.stderr


def test_reservoir_file_cannot_vanish(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    numbers = torch.arange(1000.0)
    resting = put_to_rest(numbers, "disk")
    assert os.listdir(tmp_path) == []  # it has no name that anybody could remove
    assert torch.equal(resting, numbers)


def test_sigterm_saves_if_asked(tmp_path):
    def terminate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # transformers' handler leaves the work to a timer

    settings = {**SAVING, "save_steps": 100, "enable_jit_checkpoint": True}
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.train()
    stopped = make_trainer(tmp_path / "stopped", callbacks=[Break(5, terminate)], **settings)
    found = [one for one in stopped.callback_handler.callbacks if isinstance(one, JITCheckpointCallback)]
    found[0].jit_manager.kill_wait = 0
    stopped.train()
    assert last_whole_checkpoint(tmp_path / "stopped") == str(tmp_path / "stopped" / "checkpoint-5")
    steps = Steps()
    resumed = make_trainer(tmp_path / "stopped", callbacks=[steps], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert steps.done == [6, 7, 8]
    assert same_weights(straight.model, resumed.model)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_dead_rank_stops_the_others(tmp_path, engine):
    arguments = {"directory": str(tmp_path), "die_at": 5, **SAVING}
    statuses = Run("train", 2, engine, arguments).wait()
    assert statuses[1][0] == -signal.SIGKILL
    assert statuses[0][0] == 1 and "onnection" in statuses[0][1]  # what gloo says
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    if engine == "fsdp" or torch.__version__ >= "2.12":  # older ones have no "cpu:0", where plain Trainer loads too
        launch("train", 2, engine, **{**arguments, "die_at": None}, resume=True)


@pytest.mark.slow
def test_nan_in_one_ranks_part_is_saved_by_none(tmp_path):
    arguments = {"directory": str(tmp_path), "diverge_at": 4, **SAVING}
    for status, error in Run("train", 2, "fsdp", arguments).wait():
        assert status == 1 and "'transformer.h.0.attn.c_attn.values' holds NaN" in error
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    for name, kills in (("straight", 0), ("killed", 20)):
        (tmp_path / name).mkdir()
        script = str(Path(__file__).parents[1] / "soak.py")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, script, str(tmp_path / name), str(kills), "1"]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    died, half_written = map(int, output.split()[-2:])
    assert died == 20 and half_written > 0
    one, other = (torch.load(tmp_path / name / "end.pt") for name in ("straight", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
