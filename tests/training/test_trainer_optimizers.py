"""Optimizers by the names that `TrainingArguments(optim=...)` has for them."""

import math
import os

import pytest
import torch
from toy_training import make_trainer, same_weights

from hf_topkast.surgery import sparse_layers


OPTIM = ["sgd", "adagrad", "rmsprop", "adafactor", "adamw_torch", "adamw_torch_fused"]
OPTIM += ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam", "stable_adamw"]

ARGUMENTS = {
    "sgd": "momentum=0.9",
    "adagrad": "lr_decay=0.01",
    "rmsprop": "momentum=0.5,centered=true",
    "schedule_free_adamw": "r=1.0",
}


def begin(directory, optim, **settings):
    if optim.startswith("schedule_free"):
        pytest.importorskip("schedulefree")
    if optim == "stable_adamw":
        pytest.importorskip("optimi")
    defaults = {"optim_args": ARGUMENTS.get(optim), "lr_scheduler_type": "constant"}
    return make_trainer(directory, optim=optim, **{**defaults, **settings})


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("evaluation", [{}, {"eval_strategy": "steps", "eval_steps": 5}], ids=["", "evaluated"])
@pytest.mark.parametrize(
    "optim", [pytest.param(name, marks=pytest.mark.slow if name == "stable_adamw" else ()) for name in OPTIM]
)
def test_training_goes_on_after_a_stop(tmp_path, optim, evaluation):
    """Schedule-free saves y, or after an evaluation x, which is back at y by the next step."""
    saving = {"save_strategy": "steps", "save_steps": 5, **evaluation}
    through = begin(tmp_path / "through", optim, **evaluation)
    before = {name: layer.backward_mask for name, layer in sparse_layers(through.model)}
    through.train()
    begin(tmp_path / "parts", optim, max_steps=5, **saving).train()
    resumed = begin(tmp_path / "parts", optim, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(through.model, resumed.model)
    assert losses(through)[5:] == losses(resumed)[5:]
    assert all(math.isfinite(loss) for loss in losses(through))
    assert any((layer.backward_mask & ~before[name]).any() for name, layer in sparse_layers(through.model))


@pytest.mark.parametrize("optim", ["adagrad", "schedule_free_adamw", "stable_adamw"])
def test_a_further_training_after_the_best_model(tmp_path, optim):
    trainer = begin(
        tmp_path,
        optim,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer.train()
    trainer.args.max_steps = 4
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_what_schedule_free_evaluates_is_what_it_saves(tmp_path):
    """After an evaluation the model holds x, the average; a further step brings y back."""
    steps = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = begin(tmp_path, "schedule_free_adamw", max_steps=8, **steps)
    trainer.train()
    first, last = losses(trainer, "eval_loss")
    for step, expected in ((4, first), (8, last)):
        model = type(trainer.model).from_pretrained(os.path.join(tmp_path, f"checkpoint-{step}"))
        other = make_trainer(tmp_path / "other")
        other.model.load_state_dict(model.state_dict())
        assert other.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert first != pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize(
    ("module", "name"),
    [("bitsandbytes.optim.lion", "Lion"), ("torchao.optim.adam", "AdamW8bit"), ("lomo_optim.lomo", "Lomo")],
)
def test_others_are_refused_by_name(tmp_path, module, name):
    trainer = make_trainer(tmp_path)
    kind = type(name, (torch.optim.Optimizer,), {"__module__": module})
    trainer.optimizer = kind(trainer.model.parameters(), {"lr": 0.1})
    with pytest.raises(ValueError, match=f"The optimizer {name} \\({module}\\) cannot train sparse layers"):
        trainer.train()
