"""Fine-tuning through TRL by the recipe, on conversations and on texts."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import run_sft
import torch
import yaml
from arguments import FineTuningArguments, parse_arguments
from fine_tuning import load_dense
from rows import encode, hold_out, load_rows
from run_sft import DistilledSFTTrainer, SftArguments, main
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig
from vocabulary import byte_tokenizer

from hf_topkast import TopKastConfig, TopKastDistillationConfig, sparsify, sparsity_report


RECIPE = Path(run_sft.__file__).with_name("finetune") / "chat.yaml"
DATACLASSES = (SftArguments, FineTuningArguments, TopKastConfig, SFTConfig)
TEMPLATE = "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with a tokenizer that knows conversations, both kinds of rows, and a configuration."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    choose = random.Random(0).choice
    texts = [" ".join(choose(["sparse", "dense", "layer"]) for _ in range(4)) for _ in range(48)]
    rows = {
        "chat": [
            {"messages": [{"role": "user", "content": text[:6]}, {"role": "assistant", "content": text}], "source": 1}
            for text in texts
        ],
        "text": [{"text": text} for text in texts],
        "other": [{"question": text} for text in texts],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset": str(folder / "chat.jsonl"),
        "held_out": 8,
        "max_length": 32,
        "density": 0.3,
        "backward_density": 0.5,
        "refresh_every": 3,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    return folder


def run(folder, name, *command_line):
    return main([str(folder / "config.yaml"), "--output_dir", str(folder / name), *command_line])


CALIBRATED = ("--calibration_windows", "5")
KINDS = {
    "calibrated": CALIBRATED,
    "distilled": (*CALIBRATED, "--correct", "true", "--teacher", "self", "--task_weight", "0.5"),
    "dense": ("--sparse", "false"),
}


@pytest.fixture(scope="module")
def runs(folder):
    """The results of a run of each kind, made when it is asked for."""
    made = {}

    def get(kind):
        made[kind] = made.get(kind) or run(folder, f"run-{kind}", *KINDS[kind])
        return made[kind]

    return get


def tokens_of(folder):
    """The conversations, written out by hand."""
    tokens = []
    for line in (folder / "chat.jsonl").read_text().splitlines():
        user, assistant = (message["content"] for message in json.loads(line)["messages"])
        tokens.append(torch.tensor(list(f"u:{user}\na:{assistant}\n".encode())[:32]))
    return tokens


def perplexity_of(model, texts):
    model.eval()
    with torch.no_grad():
        logits = [model(ids[None]).logits[0, :-1] for ids in texts]
    return functional.cross_entropy(torch.cat(logits), torch.cat([ids[1:] for ids in texts])).exp().item()


@pytest.mark.parametrize("kind", KINDS)
def test_stages_are_those_of_the_same_model_made_by_hand(runs, folder, kind):
    results = runs(kind)
    tokens = tokens_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert results["perplexity_before"] == pytest.approx(perplexity_of(model, tokens[-8:]), rel=1e-4)
    if kind != "dense":
        chosen = [tokens[index * 40 // 5][None] for index in range(5)]
        settings = {"density": 0.3, "backward_density": 0.5}
        sparsify(model, **settings, calibration=chosen, correct=kind == "distilled")
        assert results["perplexity_at_cut"] == pytest.approx(perplexity_of(model, tokens[-8:]), rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(folder / f"run-{kind}")
    assert results["perplexity"] == pytest.approx(perplexity_of(saved, tokens[-8:]), rel=1e-4)
    assert results["perplexity"] < results["perplexity_before"]
    assert sparsity_report(saved).density == pytest.approx(1 if kind == "dense" else 0.3, abs=2e-3)
    assert results["generate_tokens_per_second_before"] > 0 < results["generate_tokens_per_second"]
    assert json.loads((folder / f"run-{kind}" / "results.json").read_text()) == results
    card = (folder / f"run-{kind}" / "README.md").read_text()
    assert "with `recipes/run_sft.py`" in card and "before" in card
    assert AutoTokenizer.from_pretrained(folder / f"run-{kind}").chat_template == TEMPLATE


@pytest.mark.parametrize("kind", KINDS)
def test_resume_ends_where_an_unbroken_run_does(runs, folder, kind, monkeypatch):
    whole = runs(kind)
    output_dir = folder / f"run-{kind}"
    weights = load_file(output_dir / "model.safetensors")
    (output_dir / "checkpoint-8").rename(output_dir / "aside")
    resumed = run(folder, f"run-{kind}", *KINDS[kind], "--resume")
    again = load_file(output_dir / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())
    measured_anew = {"train_seconds", "command", "generate_tokens_per_second"}
    assert {key for key, value in resumed.items() if whole[key] != value} <= measured_anew


def test_the_teacher_gets_its_weights(folder, monkeypatch):
    trainers = []
    monkeypatch.setattr(
        run_sft, "DistilledSFTTrainer", lambda **given: trainers.append(DistilledSFTTrainer(**given)) or trainers[-1]
    )
    run(folder, "run-taught", *KINDS["distilled"], "--max_steps", "1")
    assert trainers[0].distillation == TopKastDistillationConfig(task_weight=0.5)
    assert trainers[0].teacher.dtype == torch.bfloat16


def test_rows_of_text(folder):
    results = run(folder, "run-text", "--dataset", str(folder / "text.jsonl"), *CALIBRATED, "--max_steps", "4")
    assert results["perplexity"] < results["perplexity_at_cut"]


def test_empty_rows_are_left_out(folder):
    lines = (folder / "text.jsonl").read_text().splitlines()
    holes = [json.dumps({"text": text}) for text in ("", None)]
    path = folder / "holes.jsonl"
    path.write_text("\n".join([*holes * 10, *lines[:40], holes[0], *lines[40:], holes[0]]))
    rows = load_rows(str(path), "train", AutoTokenizer.from_pretrained(folder / "model"))
    assert rows.to_list() == [json.loads(line) for line in lines]
    results = run(folder, "run-holes", "--dataset", str(path), *CALIBRATED, "--max_steps", "1")
    assert results["perplexity"] > 1


def test_held_out_rows_are_not_trained_on(folder):
    rows = load_rows(str(folder / "chat.jsonl"), "train", AutoTokenizer.from_pretrained(folder / "model"))
    assert rows.column_names == ["messages"]
    train, held_out = hold_out(rows, 8)
    assert (train.to_list(), held_out.to_list()) == (rows.to_list()[:40], rows.to_list()[40:])
    with pytest.raises(ValueError, match="`held_out` is 48 of 48 rows"):
        hold_out(rows, 48)


def test_a_row_is_cut_at_the_longest_length(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert encode({"text": "abcd"}, tokenizer, 3).tolist() == [97, 98, 99]
    assert encode({"text": "abcd"}, tokenizer, None).tolist() == [97, 98, 99, 100]


def test_rows_that_cannot_be_read_are_errors(folder, monkeypatch):
    monkeypatch.setattr(run_sft, "load_dense", lambda name: pytest.fail("went on"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with pytest.raises(ValueError, match=r"columns \['question'\], but neither `messages`"):
        run(folder, "wrong", "--dataset", str(folder / "other.jsonl"))
    with pytest.raises(ValueError, match="none.jsonl` does not exist"):
        run(folder, "wrong", "--dataset", str(folder / "none.jsonl"))
    with pytest.raises(ValueError, match="`--dataset nobody/nothing` could not be loaded"):
        run(folder, "wrong", "--dataset", "nobody/nothing")
    for row, message in (
        ({"messages": [{"from": "user", "value": "hello"}]}, "has rows such as .*'from'.* with `role` and `content`"),
        ({"text": 3}, "has rows such as .*3.* must be a string"),
        ({"text": "a"}, "rows held out have no token after a first one"),
        (None, "could not be loaded"),
    ):
        odd = folder / f"odd-{'empty' if row is None else hash(str(row))}.jsonl"
        odd.write_text("" if row is None else f"{json.dumps(row)}\n" * 60)
        with pytest.raises(ValueError, match=message):
            run(folder, "wrong", "--dataset", str(odd))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        load_rows(str(folder / "chat.jsonl"), "train", tokenizer)


def test_settings_that_do_not_go_together_are_errors_before_data_is_read(folder, monkeypatch):
    monkeypatch.setattr(run_sft, "load_rows", lambda *arguments: pytest.fail("went on"))
    with pytest.raises(ValueError, match="`sparse` is false"):
        run(folder, "wrong", "--sparse", "false", *CALIBRATED)
    with pytest.raises(ValueError, match="`held_out` is 0"):
        run(folder, "wrong", "--held_out", "0")
    with pytest.raises(ValueError, match="`dataset` is missing"):
        SftArguments(model_name_or_path="name")
    with pytest.raises(ValueError, match="no checkpoint in `output_dir`"):
        run(folder, "wrong", "--resume")
    with pytest.raises(ValueError, match=r"`max_lenght` \(did you mean max_length"):
        run(folder, "wrong", "--max_lenght", "3")


def test_rows_longer_than_the_model_reads_are_an_error(folder):
    with pytest.raises(ValueError, match="`max_length` is 65, but the model reads 64 tokens at most"):
        run(folder, "wrong", "--max_length", "65")


def test_a_model_that_sees_later_tokens_is_refused(folder, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert` predicts tokens from those that come after them"):
        run(folder, "wrong", "--model_name_or_path", str(tmp_path / "bert"))


def test_a_sparse_model_is_refused(folder, tmp_path):
    sparsify(AutoModelForCausalLM.from_pretrained(folder / "model"), density=0.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is sparse already.*densify"):
        load_dense(str(tmp_path))


def test_the_recipe_trains(folder, tmp_path):
    """With its own settings, bfloat16 included, but on a toy."""
    toy = json.loads((folder / "config.yaml").read_text())
    keys = ("model_name_or_path", "dataset", "held_out", "max_length", "max_steps", "use_cpu", "disable_tqdm")
    settings = yaml.safe_load(RECIPE.read_text()) | {key: toy[key] for key in keys}
    settings |= {"calibration_windows": 8, "warmup_steps": 0, "output_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert main([str(tmp_path / "config.yaml")])["density"] == pytest.approx(0.5, abs=2e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").dtype == torch.float32


@pytest.mark.slow
def test_two_processes_under_accelerate_launch_equal_one(runs, folder):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate/ddp.yaml",
        "run_sft.py",
    ]
    command += [str(folder / "config.yaml"), *KINDS["distilled"], "--output_dir", str(folder / "run-two")]
    command += ["--per_device_train_batch_size", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(RECIPE.parents[2])}
    subprocess.run(command, cwd=RECIPE.parents[1], env=environment, check=True, capture_output=True)
    results = json.loads((folder / "run-two" / "results.json").read_text())
    for stage in ("perplexity_before", "perplexity_at_cut", "perplexity"):
        assert results[stage] == pytest.approx(runs("distilled")[stage], rel=1e-4), stage


def test_the_recipe_parses_and_says_how_to_launch_it():
    text = RECIPE.read_text()
    found = parse_arguments([str(RECIPE), "--bf16", "false", "--use_cpu", "true"], DATACLASSES)
    for field, value in yaml.safe_load(text).items():
        if field not in ("bf16", "report_to"):
            assert getattr(next(holder for holder in found if hasattr(holder, field)), field) == value, field
    assert "recipes/run_sft.py recipes/finetune/chat.yaml" in text
