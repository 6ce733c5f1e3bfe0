"""The moving average as a callback of Trainer: what it is, what it saves, and how it goes on."""

import json
import shutil

import pytest
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from toy_models import MAKERS, make_gpt2, token_batches
from toy_training import make_dataset, make_trainer, same_weights
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_topkast import CheckpointError, TopKastAveragedModel, TopKastCallback, TopKastConfig, TopKastEMACallback
from hf_topkast.surgery import sparse_layers


class ByHand(TrainerCallback):
    """What the callback does, in three lines."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.averaged = TopKastAveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 2 == 0:
            self.averaged.update_parameters(model)


def dense_trainer(directory, callbacks, **settings):
    """A stock Trainer of a dense model, with the arguments of `make_trainer`."""
    args = make_trainer(directory, **settings).args
    return Trainer(model=make_gpt2(), args=args, train_dataset=make_dataset(), callbacks=callbacks)


def sparse_trainer(directory, callbacks, **settings):
    return make_trainer(directory, callbacks=callbacks, **settings)


TRAINERS = {"sparse": sparse_trainer, "dense": dense_trainer}


def as_saved(directory, step):
    return directory / f"checkpoint-{step}" / "ema"


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_the_average_of_the_weights_after_each_step(tmp_path, settings):
    ema, by_hand = TopKastEMACallback(decay=0.9, update_every=2), ByHand()
    trainer = make_trainer(tmp_path, callbacks=[ema, by_hand], **settings)
    assert ema.model is None
    trainer.train()
    assert same_weights(ema.averaged, by_hand.averaged)
    assert ema.averaged.n_averaged == 5
    assert not ema.model.training
    tokens = token_batches(1)[0]
    with torch.no_grad():  # the average computes by itself, whatever Trainer has hung on the model
        mine, trained = ema.model(input_ids=tokens).logits, trainer.model.eval()(input_ids=tokens).logits
    assert not torch.allclose(mine, trained, atol=1e-3)
    for (_, layer), (_, live) in zip(sparse_layers(ema.model), sparse_layers(trainer.model)):
        assert torch.equal(layer.active_mask, live.active_mask)  # a refresh was at step 9, the last update at 10


def test_in_a_stock_trainer(tmp_path):
    averages = []
    for kind, callbacks in ((Trainer, [TopKastCallback()]), (None, [])):
        averages.append(TopKastEMACallback(0.9))
        settings = {} if kind is None else {"kind": kind}
        make_trainer(tmp_path, callbacks=[*callbacks, averages[-1]], **settings).train()
    assert same_weights(averages[0].averaged, averages[1].averaged)


def test_training_is_left_alone(tmp_path):
    trainers = [make_trainer(tmp_path / str(i), callbacks=[TopKastEMACallback()] * i) for i in range(2)]
    for trainer in trainers:
        trainer.train()
    assert same_weights(trainers[0].model, trainers[1].model)


@pytest.mark.parametrize("make", TRAINERS.values(), ids=list(TRAINERS))
@pytest.mark.parametrize("update_every, step", [(1, 4), (3, 4), (6, 4), (1, 6)])
def test_resumes_bit_by_bit(tmp_path, make, update_every, step):
    ema = [TopKastEMACallback(0.9, update_every) for _ in range(2)]
    settings = {"save_strategy": "steps", "save_steps": step}
    make(tmp_path, [ema[0]], **settings).train()
    make(tmp_path, [ema[1]], **settings).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert ema[1].averaged.n_averaged == 10 // update_every
    assert same_weights(ema[0].averaged, ema[1].averaged)


@pytest.mark.parametrize(
    "config",
    [
        {"block_size": [4, 4], "scatter_blocks": True},
        {"reservoir_device": "cpu"},
        {"reservoir_device": "disk"},
        {"explore_until": 5},
        {"initial_density": 0.6, "schedule_begin": 0, "schedule_end": 8},
    ],
    ids=str,
)
def test_resumes_whatever_the_sets_do(tmp_path, config):
    settings = {"config": TopKastConfig(density=0.2, refresh_every=3, **config), "save_strategy": "steps"}
    averages = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        averages.append(TopKastEMACallback(0.9))
        trainer = make_trainer(tmp_path, MAKERS["llama"], callbacks=[averages[-1]], save_steps=4, **settings)
        trainer.train(resume_from_checkpoint=resume)
    assert same_weights(averages[0].averaged, averages[1].averaged)


@pytest.mark.parametrize("make", TRAINERS.values(), ids=list(TRAINERS))
def test_what_is_saved_is_a_model(tmp_path, make):
    ema = TopKastEMACallback(0.9)
    make(tmp_path, [ema], save_strategy="steps", save_steps=5, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    loaded = AutoModelForCausalLM.from_pretrained(as_saved(tmp_path, 10))
    assert same_weights(loaded, ema.model)
    record = json.loads((as_saved(tmp_path, 10) / "topkast_ema.json").read_text())
    assert record["n_averaged"] == 10
    assert not list(tmp_path.rglob("*.tmp"))


def test_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    ema = TopKastEMACallback()
    trainer = make_trainer(tmp_path, callbacks=[ema], **settings)

    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_topkast.training.ema.flush_tree", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not as_saved(tmp_path, 4).exists()
    monkeypatch.undo()
    make_trainer(tmp_path, callbacks=[TopKastEMACallback()], **settings).train()  # over what was left
    assert as_saved(tmp_path, 4).is_dir()
    assert not list(tmp_path.rglob("ema.tmp"))


def test_only_the_main_process_writes(tmp_path):
    class Other(TopKastEMACallback):
        def on_save(self, args, *others, **kwargs):
            class Ours(TrainingArguments):
                should_save = False

            args.__class__ = Ours
            super().on_save(args, *others, **kwargs)

    make_trainer(tmp_path, callbacks=[Other()], save_strategy="steps", save_steps=10).train()
    assert (tmp_path / "checkpoint-10").is_dir()
    assert not as_saved(tmp_path, 10).exists()


def test_a_second_training_begins_anew(tmp_path):
    ema = TopKastEMACallback(0.9)
    trainer = make_trainer(tmp_path, callbacks=[ema], max_steps=3)
    trainer.train()
    trainer.train()
    assert ema.averaged.n_averaged == 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    make_trainer(directory, callbacks=[TopKastEMACallback()], save_strategy="steps", save_steps=4, max_steps=4).train()
    return directory


def resumed(directory, callback, checkpoint, **settings):
    trainer = make_trainer(directory, callbacks=[callback], max_steps=6, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return callback.averaged


@pytest.mark.parametrize("damage", ["missing", "record", "weights", "state"])
def test_an_average_that_cannot_go_on_is_refused(tmp_path, saved, damage):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = as_saved(tmp_path, 4)
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage == "record":
        (folder / "topkast_ema.json").write_text("{")
    else:
        file = folder / ("model.safetensors" if damage == "weights" else "topkast_state.safetensors")
        content = bytearray(file.read_bytes())
        content[-3] ^= 64
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="ema"):
        resumed(tmp_path, TopKastEMACallback(), tmp_path / "checkpoint-4")
    averaged = resumed(tmp_path, TopKastEMACallback(resume=False), tmp_path / "checkpoint-4")
    assert averaged.n_averaged == 2


def test_a_checkpoint_elsewhere(tmp_path, saved):
    with pytest.raises(CheckpointError, match="no average to go on with.*resume=path"):
        resumed(tmp_path, TopKastEMACallback(), saved / "checkpoint-4")
    assert resumed(tmp_path, TopKastEMACallback(resume=saved / "checkpoint-4"), saved / "checkpoint-4").n_averaged == 6


def test_the_average_of_another_training_is_refused(tmp_path, saved):
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, callbacks=[TopKastEMACallback()], seed=1, **settings).train()
    with pytest.raises(CheckpointError, match="average of other weights than training resumes from"):
        resumed(tmp_path, TopKastEMACallback(), saved / "checkpoint-4")


def test_a_damaged_average_of_a_dense_model_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    dense_trainer(tmp_path, [TopKastEMACallback()], **settings).train()
    file = as_saved(tmp_path, 4) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        dense_trainer(tmp_path, [TopKastEMACallback()], **settings).train(str(tmp_path / "checkpoint-4"))


class Wrapped(torch.nn.Module):
    """No transformers model."""

    def __init__(self):
        super().__init__()
        self.inner = make_gpt2()

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids=input_ids, labels=labels)


def test_a_model_that_is_not_saved_whole(tmp_path):
    def trainer(**settings):
        args = make_trainer(tmp_path, max_steps=2, **settings).args
        return Trainer(model=Wrapped(), args=args, train_dataset=make_dataset(), callbacks=[ema])

    ema = TopKastEMACallback()
    with pytest.raises(ValueError, match="cannot save the average of a Wrapped.*save_strategy='no'"):
        trainer(save_strategy="epoch").train()
    trainer().train()
    assert ema.averaged.n_averaged == 2


@pytest.mark.parametrize("setting", [{"decay": 1.5}, {"decay": "0.9"}, {"update_every": 0}, {"update_every": 1.5}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* is not allowed"):
        TopKastEMACallback(**setting)
