"""Small trainings that tests of several rooms look at."""

import copy

import torch
from toy_models import VOCABULARY, make_gpt2, token_batches
from transformers import TrainingArguments

from hf_topkast import TopKastConfig, TopKastController, TopKastTrainer, sparsify


CONFIG = TopKastConfig(density=0.2, refresh_every=3, penalty=1e-3)


def make_dataset(count=48):
    generator = torch.Generator().manual_seed(3)
    sequences = torch.randint(0, VOCABULARY, (count, 12), generator=generator)
    return [{"input_ids": tokens, "labels": tokens} for tokens in sequences]


def make_trainer(directory, make_model=make_gpt2, config=CONFIG, kind=TopKastTrainer, callbacks=None, **settings):
    defaults = {
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    model = sparsify(make_model(), copy.deepcopy(config))
    args = TrainingArguments(output_dir=str(directory), **{**defaults, **settings})
    data = make_dataset()
    return kind(model=model, args=args, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)


def same_weights(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def checkpointed(directory, **settings):
    make_trainer(directory, save_strategy="steps", save_steps=4, max_steps=4, **settings).train()
    return directory / "checkpoint-4"


def trained(make_model, seed=0, **config):
    """A sparse model after three steps and a refresh."""
    model = sparsify(make_model(seed=seed), **{"density": 0.2, "refresh_every": 2, **config})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    TopKastController(model, optimizer)
    for tokens in token_batches(3, seed):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
