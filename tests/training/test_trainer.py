import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_models import VOCABULARY, make_gpt2, make_llama
from toy_training import CONFIG, make_dataset, make_trainer, same_weights
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_topkast import (
    CheckpointError,
    TopKastCallback,
    TopKastConfig,
    TopKastController,
    TopKastTrainer,
    TopKastTrainerMixin,
    sparsify,
    sparsity_report,
)
from hf_topkast.checkpoints.checkpoint import STATE_NAME
from hf_topkast.surgery import sparse_layers


def test_equals_a_plain_loop(make_model, tmp_path):
    trainer = make_trainer(tmp_path, make_model, lr_scheduler_type="constant", max_grad_norm=0.5)
    batches = []
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: batches.append(inputs) or step(model, inputs, *rest)
    trainer.train()

    model = sparsify(make_model(), copy.deepcopy(CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    TopKastController(model, optimizer)
    for inputs in batches:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for (name, layer), (_, other) in zip(sparse_layers(trainer.model), sparse_layers(model)):
        assert torch.equal(layer.active_mask, other.active_mask), name
        torch.testing.assert_close(layer.theta(), other.theta(), rtol=1e-4, atol=1e-4)


def test_logs_reach_every_logger(tmp_path):
    seen = []

    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(tmp_path, callbacks=[Logger()])
    trainer.train()
    keys = {"density", "backward_density", "mask_churn", "reservoir_use", "penalty"}
    for history, more in ((trainer.state.log_history, set()), (seen, {"refresh_seconds"})):
        losses = [logs for logs in history if "loss" in logs]
        assert len(losses) == 10
        assert {key.removeprefix("topkast/") for key in losses[-1] if key.startswith("topkast/")} == keys | more
        assert losses[-1]["topkast/density"] == pytest.approx(0.2, abs=1e-3)
        assert all(math.isfinite(value) for key, value in losses[-1].items() if key.startswith("topkast/"))


def test_sparse_values_get_no_weight_decay(make_model, tmp_path):
    trainer = make_trainer(tmp_path, make_model, weight_decay=0.1, max_steps=1)
    trainer.train()
    values = {id(layer.values) for _, layer in sparse_layers(trainer.model)}
    decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert {decay[key] for key in values} == {0.0}
    embeddings = trainer.model.get_input_embeddings().weight
    assert decay[id(embeddings)] == 0.1


def test_mixin_on_another_trainer(tmp_path):
    class Other(Trainer):
        def compute_loss(self, *args, **kwargs):
            self.called = True
            return super().compute_loss(*args, **kwargs)

    class Mixed(TopKastTrainerMixin, Other):
        pass

    trainer = make_trainer(tmp_path, kind=Mixed)
    trainer.train()
    assert trainer.called and trainer.topkast_controller.step == 10


def test_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no sparse layers.*sparsify"):
        TopKastTrainer(model=make_gpt2(), args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


OFTEN_EVALUATED = {
    "learning_rate": 5e-2,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # so that the best model is not the last
}


def test_best_model_and_save_limit(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **OFTEN_EVALUATED,
        load_best_model_at_end=True,
        save_total_limit=2,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(losses) == 5 and max(losses, key=losses.get) != 10
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses.values()), rel=1e-6)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert same_weights(best, trainer.model)


@pytest.mark.parametrize("settings", [{}, {"method": "static"}, {"initial_density": 1.0, "schedule_end": 8}], ids=str)
def test_a_training_of_no_step_changes_nothing(tmp_path, settings):
    trainer = make_trainer(tmp_path, config=TopKastConfig(density=0.2, **settings), max_steps=-1, num_train_epochs=0)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("loads_best", [True, False])
def test_a_best_model_on_the_way_of_a_density_schedule_is_told(tmp_path, monkeypatch, loads_best):
    warnings = []
    monkeypatch.setattr("hf_topkast.training.cautions.logger.warning", warnings.append)
    trainer = make_trainer(
        tmp_path,
        config=TopKastConfig(density=0.2, initial_density=1.0, schedule_end=8, refresh_every=2),
        **OFTEN_EVALUATED,
        load_best_model_at_end=loads_best,
    )
    trainer.train()
    density = sparsity_report(trainer.model).density
    assert len(warnings) == loads_best
    if loads_best:
        step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
        assert step < 8 and density > 0.2
        assert f"ends with the model of step {step}, and its density schedule at step 8" in warnings[0]
        assert f"has density {density:.4g}, and not density=0.2" in warnings[0]
    else:
        assert density == pytest.approx(0.2, abs=1e-3)


def test_evaluate_and_predict(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    data = make_dataset(8)
    output = trainer.predict(data)
    assert output.predictions.shape == (8, 12, VOCABULARY)
    assert output.metrics["test_loss"] == pytest.approx(trainer.evaluate(data)["eval_loss"])


def test_early_stopping_and_second_training(tmp_path):
    trainer = make_trainer(
        tmp_path,
        learning_rate=1.0,
        max_steps=10,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="loss",
        callbacks=[EarlyStoppingCallback(1)],
    )
    trainer.train()
    assert trainer.state.global_step < 10
    trainer.train()  # the first controller's hooks are gone: steps are counted once
    assert trainer.topkast_controller.step == trainer.state.global_step


def test_a_new_training_of_a_trained_model_starts_its_schedule_again(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_topkast.training.cautions.logger.warning", warnings.append)
    trained = make_trainer(tmp_path, max_steps=4)
    trained.train()
    trained.train()  # as the stock Trainer does: step 0, without a word
    assert trained.topkast_controller.step == 4 and not warnings


def test_training_on_from_the_best_model(tmp_path):
    # The best model has larger sets than the last one: moments of the last must not meet its weights.
    trainer = make_trainer(
        tmp_path,
        config=TopKastConfig(density=0.2, refresh_every=2, explore_until=5),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=1e-4,
    )
    trainer.train()
    trainer.train()
    for _, layer in sparse_layers(trainer.model):
        assert torch.isfinite(layer.values).all()


def test_pushed_checkpoints_have_the_state(tmp_path, monkeypatch):
    pushed = []
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append((tmp_path / STATE_NAME).read_bytes())
    )
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / STATE_NAME).write_bytes(b"state")
    trainer._push_from_checkpoint(str(folder))
    assert pushed == [b"state"]


def test_bfloat16_autocast(tmp_path):
    moves = []
    for bf16 in (True, False):
        trainer = make_trainer(tmp_path, make_llama, bf16=bf16, max_steps=2)  # no refresh yet
        before = {name: layer.values.detach().clone() for name, layer in sparse_layers(trainer.model)}
        trainer.train()
        assert all(layer.values.dtype == torch.float32 for _, layer in sparse_layers(trainer.model))
        moves.append(torch.cat([layer.values.detach() - before[name] for name, layer in sparse_layers(trainer.model)]))
    half, whole = moves
    assert (half - whole).norm() < 0.3 * whole.norm()


def test_any_module_is_saved_as_its_state_dict(tmp_path):
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, VOCABULARY)

        def forward(self, input_ids, labels):
            logits = self.head(self.fc(self.embed(input_ids)).relu())
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    config = TopKastConfig(density=0.2, refresh_every=3, target_modules=["fc"])
    settings = {"make_model": Toy, "config": config, "save_strategy": "steps", "save_steps": 5}
    straight = make_trainer(tmp_path, **settings)
    straight.train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same_weights(straight.model, resumed.model)


def test_model_card_has_the_densities(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    for _ in range(2):  # written anew each time
        trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Sparsity") == 1
    assert "| `transformer.h.0.attn.c_attn` | 72 × 24 | 0.2" in card


def test_engines_that_cannot_shard_sparse_values_are_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="DeepSpeed.*Use FSDP2"):
        trainer._settle_engine()
    trainer.is_deepspeed_enabled, trainer.is_fsdp_enabled = False, True
    plugin = SimpleNamespace(fsdp_version=1)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match="FSDP 1.*Use FSDP2"):
        trainer._settle_engine()


def test_the_first_checkpoint_that_cannot_be_written_names_no_other(tmp_path):
    def diverge(model):
        model.get_parameter("transformer.ln_f.weight").data[0] = torch.nan

    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            diverge(model)

    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, callbacks=[Diverge()])
    with pytest.raises(CheckpointError, match="checkpoint-2 is not written.*It was the first one: start anew"):
        trainer.train()


def test_a_trainer_without_its_callback_is_refused_when_it_trains(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.remove_callback(TopKastCallback)
    with pytest.raises(ValueError, match="TopKastCallback was removed.*Add it again"):
        trainer.train()
    trainer.add_callback(TopKastCallback())
    trainer.train()


def test_a_reference_model_that_is_averaged_slot_by_slot_is_refused(tmp_path):
    class Arguments(TrainingArguments):
        sync_ref_model = True  # as those of TRL's trainers have

    args = Arguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="sync_ref_model=True averages.*TopKastAveragedModel"):
        TopKastTrainer(model=sparsify(make_gpt2(), CONFIG), args=args, train_dataset=make_dataset())
    static = sparsify(make_gpt2(), density=0.2, method="static")  # whose sets never change
    TopKastTrainer(model=static, args=args, train_dataset=make_dataset())
