import copy
import json
import os
import signal
import subprocess
import sys

import pytest
from toy_models import make_gpt2
from toy_training import CONFIG, checkpointed, make_trainer, same_weights

from hf_topkast import (
    CheckpointError,
    TopKastConfig,
    sparsify,
)
from hf_topkast.checkpoints.checkpoint import STATE_NAME
from hf_topkast.training.ahead import taken_sets
from hf_topkast.training.callback import AHEAD_NAME


@pytest.mark.parametrize("cut", [4, 6, 9])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_bit_exact(make_model, tmp_path, cut, accumulation):
    check_resume(make_model, tmp_path, cut, accumulation, explore_until=7)


@pytest.mark.parametrize("cut", [4, 7, 9])
def test_resume_across_a_density_schedule_is_bit_exact(make_model, tmp_path, cut):
    check_resume(make_model, tmp_path, cut, initial_density=1.0, schedule_begin=0.2, schedule_end=0.8)


@pytest.mark.parametrize("cut", [4, 5, 6])
def test_resume_with_sets_chosen_ahead_is_bit_exact(tmp_path, cut):
    check_resume(make_gpt2, tmp_path, cut, refresh_lag=2)


@pytest.mark.parametrize(
    ("settings", "density"),
    [
        ({"density": 0.3}, 0.3),
        ({"refresh_every": 8}, 0.2),
        ({"density_overrides": {".*": 0.4}}, 0.4),
        ({"backward_density": 0.6}, 0.2),
        ({"distribution": "erdos_renyi"}, 0.2),
        ({"split_fused": True}, 0.2),
        ({"explore_until": 3}, 0.2),
        ({"reservoir_device": "cpu", "penalty": 0.5, "refresh_lag": 0}, None),  # the sets do not depend on these
    ],
    ids=str,
)
def test_sets_chosen_ahead_under_other_settings_are_not_used(tmp_path, monkeypatch, settings, density):
    common = {"save_strategy": "steps", "save_steps": 5}
    fields = {"refresh_every": 6, "refresh_lag": 5}
    make_trainer(tmp_path, config=TopKastConfig(**fields), max_steps=5, **common).train()
    assert (tmp_path / "checkpoint-5" / AHEAD_NAME).is_file()
    used = []
    monkeypatch.setattr(
        "hf_topkast.training.refresher.taken_sets", lambda *arguments: used.append(1) or taken_sets(*arguments)
    )
    trainer = make_trainer(tmp_path, config=TopKastConfig(**{**fields, **settings}), **common)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert bool(used) == (density is None)
    assert trainer.topkast_controller.density == pytest.approx(density or 0.2, rel=0.01)


def test_a_longer_schedule_is_not_ruined_by_sets_chosen_ahead(tmp_path):
    fields = {"initial_density": 1.0, "density_schedule": "linear", "schedule_end": 1.0, "refresh_every": 4}
    common = {"save_strategy": "steps", "save_steps": 3}
    densities = []
    for lag in (0, 3):
        config = TopKastConfig(density=0.2, refresh_lag=lag, **fields)
        make_trainer(tmp_path / str(lag), config=config, max_steps=8, **common).train()
        trainer = make_trainer(tmp_path / str(lag), config=config, max_steps=16, **common)
        trainer.train(resume_from_checkpoint=str(tmp_path / str(lag) / "checkpoint-3"))
        logs = trainer.state.log_history
        densities.append([log["topkast/density"] for log in logs if "topkast/density" in log])
    assert densities[0] == densities[1]


def test_resume_at_the_very_end_of_a_density_schedule(tmp_path):
    fields = {"initial_density": 0.9, "schedule_end": 100, "refresh_every": 3, "refresh_lag": 2, "density": 0.2}
    common = {"config": TopKastConfig(**fields), "save_strategy": "steps", "max_steps": 102}
    common |= {"lr_scheduler_type": "constant", "learning_rate": 5e-2}  # the weights still change at the end
    straight = make_trainer(tmp_path / "straight", save_steps=98, **common)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", save_steps=98, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-98"))
    assert same_weights(straight.model, resumed.model)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_resume_without_the_sets_chosen_ahead_is_refused(tmp_path, damage):
    settings = {"config": TopKastConfig(refresh_every=6, refresh_lag=5), "save_strategy": "steps", "save_steps": 5}
    make_trainer(tmp_path, max_steps=5, **settings).train()
    file = tmp_path / "checkpoint-5" / AHEAD_NAME
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=AHEAD_NAME):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_checkpoint_written_over_keeps_no_older_choice(tmp_path):
    common = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    make_trainer(tmp_path, config=TopKastConfig(refresh_every=6, refresh_lag=5), **common).train()
    make_trainer(tmp_path, config=TopKastConfig(refresh_every=6), **common).train()
    assert not (tmp_path / "checkpoint-5" / AHEAD_NAME).exists()


def test_resume_of_a_global_distribution_is_bit_exact(tmp_path):
    settings = {"initial_density": 0.8, "schedule_end": 8, "distribution": "global", "split_fused": True}
    check_resume(make_gpt2, tmp_path, 4, density_overrides={r".*h\.0\.mlp.*": 0.5}, **settings)


def check_resume(make_model, tmp_path, cut, accumulation=1, **fields):
    config = TopKastConfig(density=0.2, refresh_every=3, exploration_lr_scale=0.5, **fields)
    settings = {"config": config, "gradient_accumulation_steps": accumulation, "save_strategy": "steps"}
    straight = make_trainer(tmp_path / "straight", make_model, save_steps=cut, **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", make_model, save_steps=cut, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{cut}"))
    assert resumed.topkast_controller.step == 10
    assert same_weights(straight.model, resumed.model)
    ends = [trainer.state.log_history[-2] for trainer in (straight, resumed)]
    assert ends[0]["topkast/mask_churn"] == ends[1]["topkast/mask_churn"]
    assert ends[0]["loss"] == ends[1]["loss"]


KILLED_RUN = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from toy_training import make_trainer
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

make_trainer(sys.argv[2], save_strategy="steps", save_steps=4, callbacks=[Kill()]).train()
"""


def test_sigkill_at_a_checkpoint_loses_nothing(tmp_path):
    straight = make_trainer(tmp_path / "straight")
    straight.train()
    run = subprocess.run([sys.executable, "-c", KILLED_RUN, os.pathsep.join(sys.path), str(tmp_path / "killed")])
    assert run.returncode == -signal.SIGKILL
    resumed = make_trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(straight.model, resumed.model)


def test_resume_without_state_is_refused(tmp_path):
    checkpoint = checkpointed(tmp_path)
    (checkpoint / STATE_NAME).unlink()
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_resume_without_the_schedule_is_refused(tmp_path):
    checkpoint = checkpointed(tmp_path)
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"].pop("TopKastCallback")
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="no Top-KAST state in its trainer_state.json"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_resume_from_a_damaged_trainer_state_names_the_file(tmp_path):
    checkpoint = checkpointed(tmp_path)
    path = checkpoint / "trainer_state.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(CheckpointError, match="trainer_state.json is truncated or damaged"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_resume_from_two_moments_is_refused(tmp_path):
    checkpoint = checkpointed(tmp_path)
    path = checkpoint / "trainer_state.json"
    path.write_text(path.read_text().replace('"step": 4,', '"step": 3,'))
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["TopKastCallback"]["attributes"]["saved"]["step"] = 3
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="mixes two moments.*step 3.*step 4"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_resume_without_optimizer_is_refused(tmp_path):
    checkpoint = checkpointed(tmp_path, save_only_model=True)
    with pytest.raises(CheckpointError, match="has no optimizer.pt.*save_only_model"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_resume_from_nowhere_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint directory"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_resume_with_other_settings_warns(tmp_path, monkeypatch):
    checkpoint = checkpointed(tmp_path)
    warnings = []
    monkeypatch.setattr("hf_topkast.training.resuming.logger.warning", warnings.append)
    config = TopKastConfig(density=0.2, refresh_every=3, penalty=0.5)
    make_trainer(tmp_path, config=config).train(resume_from_checkpoint=str(checkpoint))
    assert warnings == ["Resuming with penalty=0.5; the checkpoint was trained with penalty=0.001."]


def test_resume_of_a_model_sparse_in_a_part(tmp_path):
    def trainer():
        model = make_gpt2()
        sparsify(model.transformer, copy.deepcopy(CONFIG))
        trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
        trainer.model = trainer.model_wrapped = model
        return trainer

    straight, resumed = trainer(), trainer()
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(straight.model, resumed.model)
