import numpy as np
import pytest
import torch
from toy_training import make_trainer
from transformers import Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback, integration_utils

from hf_topkast import TopKastCallback, TopKastLayerLogger
from hf_topkast.layer_log import LAYERS_NAME, append_entry, forget_after, read_layers


def logged(directory, every=None, **settings):
    trainer = make_trainer(directory, callbacks=[TopKastLayerLogger(every)], **settings)
    trainer.train(resume_from_checkpoint=settings.pop("resume", None))
    return trainer


def test_an_entry_for_each_refresh(tmp_path):
    trainer = logged(tmp_path)
    entries = read_layers(tmp_path)
    assert [entry["step"] for entry in entries] == [0, 3, 6, 9]
    layers = trainer.topkast_controller.layers
    assert all(list(entry["layers"]) == list(layers) for entry in entries)
    for name, layer in layers.items():
        assert "churn" not in entries[0]["layers"][name]
        seen = entries[-1]["layers"][name]
        assert seen["density"] == layer.density and seen["backward_density"] == layer.backward_density
        assert seen["churn"] == trainer.topkast_controller.layer_churn[name]
    assert any(seen["churn"] > 0 for seen in entries[-1]["layers"].values())


def test_at_an_interval(tmp_path):
    logged(tmp_path, every=4)
    entries = read_layers(tmp_path)
    assert [entry["step"] for entry in entries] == [0, 4, 8]
    assert all("churn" in seen for seen in entries[1]["layers"].values())


def test_a_resumed_run_supersedes_what_came_after_its_checkpoint(tmp_path):
    logged(tmp_path, save_strategy="steps", save_steps=4)
    whole = read_layers(tmp_path)
    append_entry(tmp_path, 12, {})
    trainer = make_trainer(tmp_path, callbacks=[TopKastLayerLogger()], save_strategy="steps", save_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert read_layers(tmp_path) == whole
    logged(tmp_path, max_steps=3)
    assert [entry["step"] for entry in read_layers(tmp_path)] == [0, 3]


def test_the_file_of_a_killed_run(tmp_path):
    assert read_layers(tmp_path) == []
    forget_after(tmp_path, 3)
    for step in (6, 3, 6):
        append_entry(tmp_path, step, {"a": {"churn": step / 10}})
    with (tmp_path / LAYERS_NAME).open("a") as file:
        file.write('{"step": 9, "lay')
    assert [entry["step"] for entry in read_layers(tmp_path)] == [3, 6]
    forget_after(tmp_path, 3)
    assert [entry["step"] for entry in read_layers(tmp_path)] == [3]


class Board:
    """In the place of TensorBoard's writer."""

    def __init__(self):
        self.histograms = {}

    def add_histogram(self, name, numbers, step):
        self.histograms[name, step] = numbers

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def test_histograms_go_to_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", type("M", (), {"SummaryWriter": Board}))
    board = Board()
    trainer = make_trainer(tmp_path, callbacks=[TopKastLayerLogger(), TensorBoardCallback(board)])
    trainer.train()
    kinds = {"density", "backward_density", "churn"}
    assert {name for name, step in board.histograms if step == 9} == {f"topkast/layers/{kind}" for kind in kinds}
    assert {step for _, step in board.histograms} == {0, 3, 6, 9}
    seen = read_layers(tmp_path)[-1]["layers"].values()
    np.testing.assert_array_equal(board.histograms["topkast/layers/churn", 9], [each["churn"] for each in seen])


def test_histograms_go_to_wandb(tmp_path):
    sent = []
    callback = object.__new__(WandbCallback)
    callback._wandb = type("W", (), {"log": staticmethod(sent.append), "Histogram": staticmethod(list)})
    logger = TopKastLayerLogger()
    logger.loggers = [callback]
    logger._send("topkast/layers/churn", np.array([0.5]), 7)
    assert sent == [{"topkast/layers/churn": [0.5], "train/global_step": 7}]


def test_training_is_the_same_with_it(tmp_path):
    states = []
    for callbacks in ([], [TopKastLayerLogger(1)]):
        trainer = make_trainer(tmp_path, callbacks=callbacks)
        trainer.train()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_under_a_stock_trainer(tmp_path):
    ours = make_trainer(tmp_path)
    args = TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True)
    parts = {"model": ours.model, "args": args, "train_dataset": ours.train_dataset}
    with pytest.raises(ValueError, match="TopKastLayerLogger found no TopKastController"):
        Trainer(**parts, callbacks=[TopKastLayerLogger()]).train()
    Trainer(**parts, callbacks=[TopKastLayerLogger(), TopKastCallback()]).train()
    assert [entry["step"] for entry in read_layers(tmp_path)] == [0, 3]


@pytest.mark.parametrize("every", [0, -1, 1.5, "often"])
def test_bad_input(every):
    with pytest.raises(ValueError, match="every=.* is not allowed"):
        TopKastLayerLogger(every)
