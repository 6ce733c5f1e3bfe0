"""One training by four loops: TopKastTrainer's, TRL's SFTTrainer's, Accelerate's and a plain one."""

import copy

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from toy_models import VOCABULARY, make_gpt2, make_llama
from toy_training import make_trainer, same_weights
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_topkast import TopKastConfig, TopKastController, TopKastTrainerMixin, sparsify
from hf_topkast.surgery import sparse_layers


STEPS = 10
CONFIG = TopKastConfig(density=0.2, refresh_every=3, explore_until=8, exploration_lr_scale=0.5, penalty=1e-3)
SETTINGS = {"learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_grad_norm": 0.5, "max_steps": STEPS}


class SparseSFTTrainer(TopKastTrainerMixin, SFTTrainer):
    """As a user would write it."""


def make_tokenizer():
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w0", unk_token="w1")


def make_sparse(make_model, config=CONFIG):
    return sparsify(make_model(), copy.deepcopy(config)).train()


def keep_batches(trainer):
    """The batches that a trainer's loop will see, as it sees them."""
    batches, step = [], trainer.training_step

    def training_step(model, inputs, num_items_in_batch=None):
        seen = {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "num_items_in_batch": num_items_in_batch}
        batches.append({key: tensor.clone() for key, tensor in seen.items()})
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = training_step
    return batches


def make_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    controller = TopKastController(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    return optimizer, controller, scheduler


@pytest.fixture(scope="module", params=[make_gpt2, make_llama], ids=["gpt2", "llama"])
def by_trainer(request, tmp_path_factory):
    """How the model is made, the batches, and the model that TopKastTrainer makes of them."""
    trainer = make_trainer(tmp_path_factory.mktemp("trainer"), request.param, copy.deepcopy(CONFIG), **SETTINGS)
    # TRL averages over all labels, Trainer over those that are predicted: without the first of a row both are one.
    trainer.train_dataset = [
        {"input_ids": row["input_ids"], "labels": torch.cat([torch.tensor([-100]), row["labels"][1:]])}
        for row in trainer.train_dataset
    ]
    batches = keep_batches(trainer)
    trainer.train()
    assert len(batches) == STEPS and trainer.topkast_controller.mask_churn > 0
    return request.param, batches, trainer.model


def test_plain_loop(by_trainer):
    make_model, batches, expected = by_trainer
    model = make_sparse(make_model)
    optimizer, _, scheduler = make_optimizer(model)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    assert same_weights(model, expected)


def accelerate_run(make_model, batches, directory, save_after=None, load=False, config=CONFIG):
    """An Accelerate loop, which may save its state and stop, or begin with a saved one."""
    accelerator = Accelerator(cpu=True)
    model = make_sparse(make_model, config)
    optimizer, controller, scheduler = make_optimizer(model)
    prepared, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.register_for_checkpointing(controller)
    if load:
        accelerator.load_state(directory)
    for batch in batches[controller.step :]:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if controller.step == save_after:
            accelerator.save_state(directory)
            break
    return model


def test_accelerate_loop(by_trainer, tmp_path):
    make_model, batches, expected = by_trainer
    assert same_weights(accelerate_run(make_model, batches, tmp_path), expected)


@pytest.mark.parametrize("cut", [4, 6, 9])  # within a period, at a refresh, after exploration
def test_accelerate_saves_and_loads_its_state(by_trainer, tmp_path, cut):
    make_model, batches, expected = by_trainer
    accelerate_run(make_model, batches, tmp_path, save_after=cut)
    assert same_weights(accelerate_run(make_model, batches, tmp_path, load=True), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"density": 0.2, "method": "rigl", "update_until": 8},
        {"density": 0.5},
        {"density": 0.5, "reservoir_device": "disk"},
        {"density": 0.2, "initial_density": 1.0, "schedule_begin": 6, "schedule_end": 9},
    ],
    ids=str,
)
def test_accelerates_state_of_layers_without_a_reservoir(by_trainer, tmp_path, settings):
    """Of all empty tensors it saves one."""
    make_model, batches, _ = by_trainer
    config = TopKastConfig(refresh_every=3, **settings)
    expected = accelerate_run(make_model, batches, tmp_path, config=config)
    accelerate_run(make_model, batches, tmp_path, save_after=4, config=config)
    assert same_weights(accelerate_run(make_model, batches, tmp_path, load=True, config=config), expected)


def test_trl(by_trainer, tmp_path):
    make_model, batches, expected = by_trainer
    data = Dataset.from_dict(
        {key: torch.cat([batch[key] for batch in batches]).tolist() for key in ("input_ids", "labels")}
    )
    args = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **SETTINGS,
    )
    trainer = SparseSFTTrainer(
        model=make_sparse(make_model), args=args, train_dataset=data, processing_class=make_tokenizer()
    )
    seen = keep_batches(trainer)
    trainer.train()
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(batches, seen, strict=True))
    # TRL computes the loss in chunks of its own, which rounds differently; the sets are the same all the same.
    for (name, layer), (_, other) in zip(sparse_layers(trainer.model), sparse_layers(expected)):
        assert torch.equal(layer.active_mask, other.active_mask), name
        torch.testing.assert_close(layer.theta(), other.theta(), rtol=0, atol=2e-5)
