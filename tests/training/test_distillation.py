import copy
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from ranks import launch
from test_loops import make_tokenizer
from torch import nn
from torch.nn import functional
from toy_models import VOCABULARY, make_gpt2, make_llama
from toy_training import CONFIG, make_dataset, make_trainer, same_weights
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_topkast import (
    TopKastDistillationConfig,
    TopKastDistillationMixin,
    TopKastDistillationTrainer,
    TopKastTrainer,
    densify,
    sparsify,
)
from hf_topkast.training.distillation_loss import hidden_error, logit_divergence


WEIGHTS = TopKastDistillationConfig(task_weight=0.5, logit_weight=2.0, hidden_weight=3.0, temperature=1.5)


class DistilledSFTTrainer(TopKastDistillationMixin, SFTTrainer):
    """As a user would write it."""


def ragged(count=16, masked=2):
    """Rows of different lengths, padded on the right, whose first labels are not counted."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in torch.randint(4, 13, (count,), generator=generator).tolist():
        tokens = torch.randint(1, VOCABULARY, (12,), generator=generator)
        mask = (torch.arange(12) < length).long()
        labels = tokens.masked_fill(mask == 0, -100)
        labels[:masked] = -100
        rows.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})
    return rows


def batched(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def sharp(model):
    """A model that is surer of its tokens than a new one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def make_distillation(directory, make_model=make_gpt2, weights=WEIGHTS, teacher=None, data=None, **settings):
    """A trainer whose teacher is the model before it was made sparse, but surer."""
    teacher = sharp(make_model()) if teacher is None else teacher

    def kind(**arguments):
        arguments["train_dataset"] = data or ragged()
        return TopKastDistillationTrainer(teacher=teacher, distillation=weights, **arguments)

    return make_trainer(directory, make_model, kind=kind, **settings)


def shown(model, batch):
    """Logits and block outputs, by a way of its own."""
    outputs = []
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    hooks = [block.register_forward_hook(lambda module, given, found: outputs.append(found)) for block in blocks]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for hook in hooks:
        hook.remove()
    return logits, [output if isinstance(output, torch.Tensor) else output[0] for output in outputs]


def written_out(student, teacher, batch, weights, steps_labels=None, steps_tokens=None):
    """The loss as in the docs, by loops over tokens."""
    own, own_blocks = shown(student, batch)
    with torch.no_grad():
        other, other_blocks = shown(teacher, batch)
    task, divergence, errors, labels, tokens = 0.0, 0.0, 0.0, 0, 0
    for row in range(len(own)):
        for place in range(12):
            if place < 11 and batch["labels"][row, place + 1] != -100:
                task = task + functional.cross_entropy(own[row, place], batch["labels"][row, place + 1])
                ours, theirs = ((logits[row, place] / weights.temperature).log_softmax(0) for logits in (own, other))
                divergence = divergence + weights.temperature**2 * (theirs.exp() * (theirs - ours)).sum()
                labels += 1
            if batch["attention_mask"][row, place]:
                for ours, theirs in zip(own_blocks, other_blocks):
                    difference = ours[row, place] - theirs[row, place]
                    errors = errors + difference.dot(difference) / theirs[row, place].norm() ** 2 / len(own_blocks)
                tokens += 1
    labels, tokens = steps_labels or labels, steps_tokens or tokens
    return task / labels, divergence / labels, errors / tokens


def test_the_loss_and_its_gradient_are_the_written_formula(make_model, tmp_path):
    def wide():
        return make_model(dtype=torch.float64)

    trainer = make_distillation(tmp_path, wide)
    batch = batched(ragged(6))
    student = trainer.model.train()
    loss = trainer.compute_loss(student, dict(batch))
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    task, divergence, errors = written_out(student, trainer.teacher, batch, WEIGHTS)
    expected = 0.5 * task + 2.0 * divergence + 3.0 * errors
    assert min(task, divergence, errors) > 1e-3  # none of them is lost in the others
    # transformers' cross entropy rounds the logits to float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    expected.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("part", range(3), ids=["task", "logits", "hidden"])
def test_each_weight_weighs_its_part_alone(tmp_path, part):
    names = ("task_weight", "logit_weight", "hidden_weight")
    weights = {name: 0.7 if index == part else 0.0 for index, name in enumerate(names)}
    if part == 0:
        weights["logit_weight"] = 1e-30
    trainer = make_distillation(tmp_path, weights=TopKastDistillationConfig(**weights))
    batch = batched(ragged(4))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    parts = written_out(trainer.model, trainer.teacher, batch, trainer.distillation)
    assert loss.item() == pytest.approx(0.7 * parts[part].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_by_chunks_is_that_of_all_tokens(monkeypatch, dtype):
    torch.manual_seed(0)
    student = torch.randn(3, 7, 50, dtype=dtype, requires_grad=True)
    teacher, counted = torch.randn(3, 7, 50, dtype=dtype), torch.rand(3, 7) > 0.3
    results = []
    for chunk in (2**24, 4 * 50, 1):
        monkeypatch.setattr("hf_topkast.training.distillation_loss.CHUNK", chunk)
        total = logit_divergence(student, teacher, counted, 2.0)
        results.append((total, *torch.autograd.grad(total, student)))
    own, other = student[counted].float() / 2, teacher[counted].float() / 2
    expected = 4 * functional.kl_div(own.log_softmax(1), other.softmax(1), reduction="sum")
    gradient = torch.autograd.grad(expected, student)[0]
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == dtype
    for total, found in results:
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(found, gradient, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert torch.all(results[0][1][~counted] == 0)


def test_accumulation_equals_one_large_batch(make_model, tmp_path):
    runs = {}
    for size, accumulation in ((8, 1), (2, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_distillation(tmp_path, make_model, max_steps=4, optim="sgd", learning_rate=0.1, **settings)
        trainer.train()
        runs[size] = trainer
    one, many = runs[8], runs[2]
    for (name, parameter), other in zip(one.model.named_parameters(), many.model.parameters()):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6, msg=name)
    for first, second in zip(losses(one), losses(many), strict=True):
        for key in ("loss", "distill/task", "distill/logits", "distill/hidden"):
            assert first[key] == pytest.approx(second[key], rel=1e-4), key


def losses(trainer):
    return [logs for logs in trainer.state.log_history if "loss" in logs]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logs_are_means_over_the_window(tmp_path, accumulation):
    settings = {"max_steps": 6, "gradient_accumulation_steps": accumulation}
    each = make_distillation(tmp_path, **settings)
    each.train()
    thirds = make_distillation(tmp_path, logging_steps=3, **settings)
    thirds.train()
    for window, logs in enumerate(losses(thirds)):
        inside = losses(each)[3 * window : 3 * window + 3]
        for key in ("task", "logits", "hidden"):
            mean = sum(entry[f"distill/{key}"] for entry in inside) / 3
            assert logs[f"distill/{key}"] == pytest.approx(mean, rel=1e-5)
        parts = 0.5 * logs["distill/task"] + 2 * logs["distill/logits"] + 3 * logs["distill/hidden"]
        assert logs["loss"] == pytest.approx(parts, rel=1e-4)
    assert len(losses(thirds)) == 2


@pytest.mark.parametrize("cut", [4, 6])
def test_resume_is_bit_exact(make_model, tmp_path, cut):
    settings = {"save_strategy": "steps", "save_steps": cut, "gradient_accumulation_steps": 2}
    straight = make_distillation(tmp_path / "straight", make_model, **settings)
    straight.train()
    resumed = make_distillation(tmp_path / "resumed", make_model, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{cut}"))
    assert same_weights(straight.model, resumed.model)
    assert losses(straight) == losses(resumed)  # the first of which it was told by the checkpoint


def test_the_teacher_is_neither_saved_nor_changed(tmp_path):
    teacher = make_gpt2()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_distillation(tmp_path / "taught", teacher=teacher, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    plain = make_trainer(tmp_path / "plain", save_strategy="steps", save_steps=2, max_steps=2)
    plain.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    files = [sorted(os.listdir(tmp_path / run / "checkpoint-2")) for run in ("taught", "plain")]
    assert files[0] == files[1]
    for name in ("model.safetensors", "optimizer.pt"):
        sizes = [Path(tmp_path, run, "checkpoint-2", name).stat().st_size for run in ("taught", "plain")]
        assert abs(sizes[0] - sizes[1]) < 1000
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in teacher.parameters()}
    assert not any(block._forward_hooks for block in (*teacher.modules(), *trainer.model.modules()))


def test_evaluation_is_of_the_task_alone(tmp_path):
    trainer = make_distillation(tmp_path)
    plain = make_trainer(tmp_path)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=str,
)
def test_settings_of_the_trainer(make_model, tmp_path, settings):
    logs = []
    for extra in ({}, settings):
        trainer = make_distillation(tmp_path, make_model, max_steps=3, **extra)
        trainer.train()
        logs.append([entry[f"distill/{part}"] for entry in losses(trainer) for part in ("logits", "hidden")])
    assert logs[0] == pytest.approx(logs[1], rel=0.1)
    if settings.keys() & {"gradient_checkpointing", "torch_compile"}:
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_blocks_that_no_gradient_reaches_are_an_error(tmp_path):
    trainer = make_distillation(tmp_path)
    batch, model = batched(ragged(2)), trainer.model.train()
    backbone, forward = model.transformer, model.transformer.forward

    def hidden(*arguments, **options):  # as reentrant checkpointing does
        with torch.no_grad():
            return forward(*arguments, **options)

    backbone.forward = hidden
    with pytest.raises(ValueError, match="Only 0 of 2 decoder blocks of GPT2LMHeadModel.*use_reentrant=True"):
        trainer.compute_loss(model, batch)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process(tmp_path, engine):
    reports = []
    for ranks, way in ((1, "ddp"), (2, engine)):
        directory = tmp_path / str(ranks)
        directory.mkdir()
        launch("distil", ranks, way, directory=str(directory), per_device_train_batch_size=4 // ranks)
        reports.append(torch.load(directory / "report.pt"))
    one, two = reports
    assert one.keys() == two.keys()
    assert [one.pop("ranks").item(), two.pop("ranks").item()] == [1, 2]
    torch.testing.assert_close(one.pop("parts"), two.pop("parts"), rtol=1e-4, atol=0)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-5, msg=name)


def make_sft(directory, make_model=make_llama, weights=WEIGHTS, **settings):
    rows = [row["input_ids"][: row["attention_mask"].sum()].tolist() for row in ragged()]
    defaults = {"max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = SFTConfig(output_dir=str(directory), **{**defaults, **common, **settings})
    return DistilledSFTTrainer(
        model=sparsify(make_model(), copy.deepcopy(CONFIG)),
        teacher=sharp(make_model()),
        distillation=weights,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": False}, {"label_smoothing_factor": 0.1}], ids=str)
def test_trl(make_model, tmp_path, settings):
    trainer = make_sft(tmp_path, make_model, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    student = trainer.model.train()
    loss = trainer.compute_loss(student, dict(batch))
    padded = 12 - batch["input_ids"].shape[1]
    wide = {key: functional.pad(batch[key], (0, padded), value=-100 * (key == "labels")) for key in batch}
    task, divergence, errors = written_out(student, trainer.teacher, wide, WEIGHTS)
    if "label_smoothing_factor" in settings:
        logits = student(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
        task = trainer.label_smoother({"logits": logits}, batch["labels"], shift_labels=True)
    expected = 0.5 * task + 2 * divergence + 3 * errors
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    found = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    expected.backward()
    for gradient, parameter in zip(found, student.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
    trainer.train()
    assert trainer.topkast_controller.step == 4
    assert {"distill/logits", "mean_token_accuracy", "entropy"} <= losses(trainer)[-1].keys()


def test_accumulation_under_trl(tmp_path):
    parts = []
    for size, accumulation in ((8, 1), (2, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_sft(tmp_path, optim="sgd", max_steps=2, **settings)
        trainer.train()
        parts.append([logs[f"distill/{part}"] for logs in losses(trainer) for part in ("task", "logits", "hidden")])
    assert parts[0] == pytest.approx(parts[1], rel=1e-4)


def test_a_student_comes_closer_to_a_trained_teacher(tmp_path):
    data = make_dataset()
    teacher = make_gpt2()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    tokens = torch.stack([row["input_ids"] for row in data])
    for _ in range(40):
        teacher(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert teacher(input_ids=tokens, labels=tokens).loss < 2.5  # of ln 48 = 3.9

    def divergence(student):
        with torch.no_grad():
            both = (model.eval()(input_ids=tokens).logits for model in (student, teacher))
            return logit_divergence(*both, torch.ones_like(tokens, dtype=torch.bool), 1.0).item() / tokens.numel()

    def make_student():
        return copy.deepcopy(teacher).requires_grad_(True)

    settings = {"max_steps": 60, "logging_steps": 20, "per_device_train_batch_size": 8}
    weights = TopKastDistillationConfig(task_weight=0.0)
    taught = make_distillation(tmp_path, make_student, weights, teacher=teacher, data=data, **settings)
    before = divergence(taught.model)
    taught.train()
    alone = make_trainer(tmp_path, make_student, **settings)
    alone.train()
    assert divergence(taught.model) < 0.5 * before
    assert divergence(taught.model) < divergence(alone.model)


class TestTeachers:
    def test_by_directory_in_bfloat16(self, tmp_path):
        sharp(make_gpt2()).save_pretrained(tmp_path / "teacher")
        trainer = make_distillation(tmp_path, teacher=str(tmp_path / "teacher"), max_steps=2)
        assert trainer.teacher.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
        trainer.train()
        exact = make_distillation(tmp_path, max_steps=2)
        exact.train()
        for first, second in zip(losses(trainer), losses(exact)):
            assert first["distill/logits"] == pytest.approx(second["distill/logits"], rel=0.1)

    def test_a_wider_one_for_logits_alone(self, tmp_path):
        teacher = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=32, vocab_size=VOCABULARY))
        weights = TopKastDistillationConfig(hidden_weight=0)
        make_distillation(tmp_path, weights=weights, teacher=teacher, max_steps=1).train()
        for change, named in (({"n_layer": 3}, "number of blocks of 3"), ({"n_embd": 32}, "width of 32")):
            config = GPT2Config(
                **{"n_layer": 2, "n_embd": 24, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY, **change}
            )
            with pytest.raises(ValueError, match=f"{named}.*hidden_weight=0"):
                make_distillation(tmp_path, teacher=GPT2LMHeadModel(config))

    def test_another_vocabulary_is_refused(self, tmp_path):
        teacher = make_gpt2()
        teacher.resize_token_embeddings(VOCABULARY + 2)
        with pytest.raises(ValueError, match="GPT2LMHeadModel.*vocabulary of 50.*one of 48.*resize_token_embeddings"):
            make_distillation(tmp_path, teacher=teacher)

    def test_another_tokenizer_of_the_same_size_is_refused(self, tmp_path):
        make_gpt2().save_pretrained(tmp_path / "teacher")
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(tmp_path / "teacher")
        ids = {"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]}

        def trainer():
            return DistilledSFTTrainer(
                model=sparsify(make_gpt2(), copy.deepcopy(CONFIG)),
                teacher=tmp_path / "teacher",
                args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
                train_dataset=Dataset.from_dict(ids),
                processing_class=tokenizer,
            )

        trainer()
        path = tmp_path / "teacher" / "tokenizer.json"
        written = json.loads(path.read_text())
        words = written["model"]["vocab"]
        words["w7"], words["w8"] = words["w8"], words["w7"]
        path.write_text(json.dumps(written))
        with pytest.raises(ValueError, match="another vocabulary.*'w[78]' is [78] and [78].*student's tokenizer"):
            trainer()

    def test_the_student_and_sparse_models_are_refused(self, tmp_path):
        model = make_gpt2()
        with pytest.raises(ValueError, match="The teacher is the student itself.*copy.deepcopy"):
            make_distillation(tmp_path, lambda: model, teacher=model)
        assert all(parameter.requires_grad for parameter in model.parameters())
        model = make_gpt2()
        tied = make_gpt2()
        tied.transformer.wpe.weight = model.transformer.wpe.weight
        with pytest.raises(ValueError, match="shares 'transformer.wpe.weight' with the student.*copy.deepcopy"):
            make_distillation(tmp_path, lambda: model, teacher=tied)
        sparse = sparsify(make_gpt2(), copy.deepcopy(CONFIG))
        with pytest.raises(ValueError, match="8 sparse layers.*'transformer.h.0.attn.c_attn'.*densify"):
            make_distillation(tmp_path, teacher=sparse)
        make_distillation(tmp_path, teacher=densify(sparse))

    def test_what_predicts_no_next_token_is_refused(self, tmp_path):
        masked = BertForMaskedLM(BertConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=2, vocab_size=48))
        with pytest.raises(ValueError, match="The teacher is a BertForMaskedLM, which is no causal language model"):
            make_distillation(tmp_path, teacher=masked)
        with pytest.raises(ValueError, match="The student is a BertForMaskedLM.*Train with TopKastTrainer"):
            make_distillation(tmp_path, lambda: masked, teacher=make_gpt2())

    def test_what_is_no_transformers_model(self, tmp_path):
        with pytest.raises(TypeError, match="teacher is a Linear: give a transformers model"):
            make_distillation(tmp_path, teacher=nn.Linear(2, 2))
        with pytest.raises(TypeError, match="takes a TopKastDistillationConfig, not {'task_weight': 1}"):
            make_distillation(tmp_path, weights={"task_weight": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_weight": -1}, "task_weight=-1 is not allowed.*at least 0"),
        ({"logit_weight": float("nan")}, "logit_weight=nan"),
        ({"hidden_weight": "1"}, "hidden_weight='1'"),
        ({"temperature": 0}, "temperature=0 .*above 0"),
        ({"logit_weight": 0, "hidden_weight": 0}, "logit_weight=0, hidden_weight=0 nothing is learnt.*TopKastTrainer"),
    ],
)
def test_weights_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TopKastDistillationConfig(**settings)


def test_batches_that_say_too_little_are_refused(tmp_path):
    trainer = make_distillation(tmp_path)
    batch = batched(ragged(2))
    with pytest.raises(ValueError, match="attention_mask is \\(2, 1, 12, 12\\).*hidden_weight=0"):
        mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
        trainer.compute_loss(trainer.model.train(), {**batch, "attention_mask": mask})
    trainer = make_distillation(tmp_path, weights=TopKastDistillationConfig(task_weight=0))
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    del batch["labels"]
    with pytest.raises(ValueError, match="no 'labels'.*logit_weight=0"):
        trainer.compute_loss(trainer.model.train(), batch)


def test_a_fused_loss_without_logits(tmp_path, monkeypatch):
    trainer = make_distillation(tmp_path)
    model, forward = trainer.model.train(), trainer.model.forward
    batch = batched(ragged(2))
    expected = trainer.compute_loss(model, dict(batch)).item()

    def fused(**inputs):  # as Liger's
        output = forward(**inputs)
        output.logits = None
        return output

    model.forward = fused
    # They are made all the same, by the head of the class, of what the backbone has found.
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected, rel=1e-6)
    assert "forward" not in model.transformer.__dict__
    # But not where there is no telling backbone and head apart.
    monkeypatch.setattr(type(model), "base_model_prefix", "none")
    with pytest.raises(ValueError, match="computed a loss and no logits.*use_liger_kernel=False.*logit_weight=0"):
        trainer.compute_loss(model, dict(batch))


def test_an_adapter_learns_from_the_teacher(tmp_path):
    def make_student(**arguments):
        config = LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        arguments["model"] = get_peft_model(arguments["model"], config)
        return TopKastDistillationTrainer(teacher=sharp(make_gpt2()), **arguments)

    trainer = make_trainer(tmp_path, kind=make_student, max_steps=8, learning_rate=5e-2)
    trainer.train()
    assert losses(trainer)[-1]["distill/hidden"] < 0.9 * losses(trainer)[0]["distill/hidden"]


def test_a_trained_prompt_whose_tokens_the_teacher_lacks_is_refused(tmp_path):
    def make_student(**arguments):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        arguments["model"] = get_peft_model(arguments["model"], config)
        return TopKastDistillationTrainer(teacher=make_gpt2(), **arguments)

    trainer = make_trainer(tmp_path, kind=make_student)
    with pytest.raises(ValueError, match=r"output of \(4, 15, 24\).* \(batch, tokens\) = \(4, 12\).*hidden_weight=0"):
        trainer.train()


def test_a_token_in_several_streams_is_one_token():
    student, teacher = torch.randn(2, 2, 5, 3, 8, dtype=torch.float64)  # (batch, tokens, streams, width)
    counted = torch.rand(2, 5) < 0.7
    joined = (hidden.flatten(2) for hidden in (student, teacher))
    torch.testing.assert_close(hidden_error(student, teacher, counted), hidden_error(*joined, counted))


def test_several_devices_in_one_process_are_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2
    model = sparsify(make_gpt2(), copy.deepcopy(CONFIG))
    with pytest.raises(ValueError, match="n_gpu=2.*accelerate launch"):
        TopKastDistillationTrainer(model=model, teacher=make_gpt2(), args=args, train_dataset=make_dataset())


def test_training_without_a_teacher_is_as_before(tmp_path):
    """At weights of almost nothing the teacher changes nothing."""
    weights = TopKastDistillationConfig(logit_weight=1e-30, hidden_weight=0)
    taught = make_distillation(tmp_path, weights=weights, data=make_dataset())
    taught.train()
    plain = make_trainer(tmp_path, kind=TopKastTrainer)
    plain.train()
    assert same_weights(taught.model, plain.model)
