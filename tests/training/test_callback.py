import logging
import re

import pytest
from toy_training import checkpointed, make_trainer, same_weights
from transformers import Trainer, TrainerCallback

from hf_topkast import TopKastCallback, TopKastConfig


def test_a_plain_trainers_loggers_get_the_metrics(tmp_path):
    class Logger(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    seen = []
    trainer = make_trainer(tmp_path, kind=Trainer, callbacks=[TopKastCallback(), Logger()], max_steps=3)
    trainer.train()
    with_loss = [logs for logs in seen if "loss" in logs]
    assert len(with_loss) == 3
    assert all(logs["topkast/density"] == pytest.approx(0.2, abs=1e-3) for logs in with_loss)
    assert not any("topkast/density" in logs for logs in seen if "loss" not in logs)


def test_stock_trainer_cannot_resume_silently(tmp_path):
    checkpoint = checkpointed(tmp_path)
    trainer = make_trainer(tmp_path, kind=Trainer, callbacks=[TopKastCallback()])
    with pytest.raises(RuntimeError, match="is sparse, but the state dict holds a dense"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_callback_in_a_stock_trainer(tmp_path):
    mine, stock = make_trainer(tmp_path), make_trainer(tmp_path, kind=Trainer, callbacks=[TopKastCallback()])
    mine.train()
    stock.train()
    assert same_weights(mine.model, stock.model)


def test_a_reference_model_that_is_averaged_slot_by_slot_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, kind=Trainer, callbacks=[TopKastCallback()])
    trainer.args.sync_ref_model = True  # as those of TRL's trainers have
    with pytest.raises(ValueError, match="sync_ref_model=True averages.*TopKastAveragedModel"):
        trainer.train()


def test_only_one_callback(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[TopKastCallback()])
    trainer.train()
    other = make_trainer(tmp_path)
    other.train()
    assert same_weights(trainer.model, other.model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"explore_until": 0.5}, r"exploration ends at step 6 then, 12 now\. What had ended may begin again"),
        ({"method": "rigl"}, r"exchanges end at step 9 then, 18 now"),
        ({"method": "static", "explore_until": 0.5}, None),
        ({"initial_density": 0.8}, r"the density falls in steps \[0, 6\] then, \[0, 12\] now"),
        ({"explore_until": 6}, None),
    ],
    ids=str,
)
def test_another_number_of_steps_moves_fractions_which_is_said(tmp_path, caplog, monkeypatch, settings, said):
    monkeypatch.setattr(logging.getLogger("hf_topkast"), "propagate", True)
    config = TopKastConfig(density=0.2, refresh_every=2, **settings)
    kind = {"config": config, "save_strategy": "steps", "save_steps": 8}
    make_trainer(tmp_path, max_steps=12, **kind).train()
    make_trainer(tmp_path, max_steps=12, **kind).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "at other steps than before" not in caplog.text
    make_trainer(tmp_path, max_steps=24, **kind).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    messages = [record.message for record in caplog.records if "from step 8 begin or end" in record.message]
    assert len(messages) == (said is not None)
    assert said is None or re.search(said, messages[0])
