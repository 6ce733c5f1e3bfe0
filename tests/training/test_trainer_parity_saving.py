"""What `transformers.Trainer` does, done by TopKastTrainer: saving, resuming, the best model."""

import json
import shutil

import pytest
from test_trainer_parity import DenseTrainer, Stream, events, history, losses, pair
from toy_training import make_trainer, same_weights
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from hf_topkast import TopKastConfig, TopKastTrainer
from hf_topkast.checkpoints import OUR_FILES


def folders(directory):
    return sorted(path.name for path in directory.glob("checkpoint-*"))


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "steps", "save_steps": 3},
        {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2},
        {"save_strategy": "steps", "save_steps": 4, "save_only_model": True},
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
        {"save_strategy": "steps", "save_steps": 0.25, "max_steps": 8},
        {"save_strategy": "no"},
    ],
    ids=str,
)
def test_checkpoint_folders_as_the_stock_trainer(tmp_path, settings):
    ours, stock = pair(tmp_path, **settings)
    assert folders(tmp_path / "sparse") == folders(tmp_path / "dense")
    assert events(ours) == events(stock)
    for folder in folders(tmp_path / "sparse"):
        extra = files(tmp_path / "sparse" / folder) ^ files(tmp_path / "dense" / folder)
        assert extra == set(OUR_FILES)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "sparse" / folder).topkast.step == int(folder[11:])


def test_trainer_state_as_the_stock_trainer(tmp_path):
    pair(tmp_path, save_strategy="steps", save_steps=5, max_steps=5)
    one, other = (
        json.loads((tmp_path / name / "checkpoint-5" / "trainer_state.json").read_text())
        for name in ("sparse", "dense")
    )
    assert one.keys() == other.keys()
    assert one["stateful_callbacks"].keys() - other["stateful_callbacks"].keys() == {"TopKastCallback"}


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "load_best_model_at_end": True,
    "max_steps": 8,
}


def score(trainer):
    """A metric that is best at step 4."""
    trainer.compute_metrics = lambda output: {"score": -abs(trainer.state.global_step - 4)}


@pytest.mark.parametrize(
    "settings",
    [
        {"save_strategy": "steps", "save_steps": 2},
        {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
        {"save_strategy": "best"},
    ],
    ids=str,
)
def test_best_model_as_the_stock_trainer(tmp_path, settings):
    kept = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                kept[type(model.get_submodule("transformer.h.0.mlp.c_fc"))] = {
                    key: tensor.clone() for key, tensor in model.state_dict().items()
                }

    def change(trainer):
        score(trainer)
        trainer.add_callback(Keep())

    ours, stock = pair(tmp_path, change, **BEST, **settings)
    assert folders(tmp_path / "sparse") == folders(tmp_path / "dense")
    assert ours.state.best_metric == stock.state.best_metric == 0
    assert ours.state.best_model_checkpoint.endswith("checkpoint-4")
    for trainer in (ours, stock):
        state = trainer.model.state_dict()
        expected = kept[type(trainer.model.get_submodule("transformer.h.0.mlp.c_fc"))]
        assert all((state[key] == tensor).all() for key, tensor in expected.items())


def test_the_best_model_is_remembered_over_a_resume(tmp_path):
    settings = {**BEST, "save_strategy": "steps", "save_steps": 2}
    straight = make_trainer(tmp_path, **settings)
    score(straight)
    straight.train()
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed = make_trainer(tmp_path, **settings)
    score(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == straight.state.best_model_checkpoint
    assert straight.model.topkast.step == resumed.model.topkast.step < 8
    assert same_weights(straight.model, resumed.model)
    assert history(resumed)[:-1] == history(straight)[:-1]


class Stop(TrainerCallback):
    """Ends a training early, as a job's time limit does, while its schedules are those of the whole."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


ACCUMULATION = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("settings", "stop"),
    [({}, 5), ({}, 12), (ACCUMULATION, 11)],
    ids=["within an epoch", "at its end and at a refresh", "with accumulation"],
)
def test_resume_over_epochs(tmp_path, settings, stop):
    settings = {"max_steps": -1, "num_train_epochs": 2, "lr_scheduler_type": "cosine", **settings}
    config = TopKastConfig(density=0.2, refresh_every=3, explore_until=0.5)  # of the whole training
    straight = make_trainer(tmp_path / "straight", config=config, **settings)
    straight.train()
    make_trainer(tmp_path / "cut", config=config, callbacks=[Stop(stop)], **settings).train()
    assert folders(tmp_path / "cut") == [f"checkpoint-{stop}"]
    resumed = make_trainer(tmp_path / "cut", config=config, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(straight.model, resumed.model)
    assert history(resumed) == history(straight)
    assert losses(resumed) == losses(straight)


def test_resume_of_a_stream(tmp_path):
    def run(**settings):
        trainer = make_trainer(tmp_path, max_steps=15, **settings)
        trainer.train_dataset = Stream()
        return trainer

    straight, cut, resumed = run(), run(callbacks=[Stop(7)]), run()
    straight.train()
    cut.train()
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(straight.model, resumed.model)


def test_resume_for_more_steps_and_other_data(tmp_path):
    make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4).train()
    longer = make_trainer(tmp_path, max_steps=9, ignore_data_skip=True, per_device_train_batch_size=3)
    longer.train(resume_from_checkpoint=True)
    assert longer.topkast_controller.step == longer.state.global_step == 9


def test_resume_of_a_finished_training_as_the_stock_trainer(tmp_path):
    steps = []
    for kind in (TopKastTrainer, DenseTrainer):
        make_trainer(tmp_path / kind.__name__, kind=kind, max_steps=4, save_strategy="steps", save_steps=4).train()
        again = make_trainer(tmp_path / kind.__name__, kind=kind, max_steps=4)
        steps.append(again.train(resume_from_checkpoint=True).global_step)
    assert steps[0] == steps[1]


def test_callbacks_resume_too(tmp_path):
    def run(**settings):
        callback = EarlyStoppingCallback(early_stopping_patience=3)
        settings = {**BEST, "save_strategy": "steps", "save_steps": 2, "max_steps": 20, **settings}
        trainer = make_trainer(
            tmp_path, callbacks=[callback], restore_callback_states_from_checkpoint=True, **settings
        )
        score(trainer)
        return trainer

    first = run(max_steps=6)  # one evaluation worse than the best
    first.train()
    second = run()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert second.state.global_step == 10
    assert second.topkast_controller is not None and second.model.topkast.step == 4


def test_save_model_writes_what_from_pretrained_reads(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "final"), trainer.model)
    assert (tmp_path / "final" / "training_args.bin").is_file()
