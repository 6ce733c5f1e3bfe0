import json
import math
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import results as results_module
import run_clm
import torch
from arguments import ModelArguments
from data import Corpus
from run_clm import build_model, find_checkpoint, main
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from vocabulary import byte_tokenizer
from windows import EvaluationWindows

import hf_topkast
from hf_topkast import sparsity_report


SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_inner": 64, "activation_function": "gelu_pytorch_tanh"}
WINDOW = 32
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small text and a configuration that trains on it."""
    folder = tmp_path_factory.mktemp("run")
    choose = random.Random(0).choice
    lines = [" ".join(choose(["sparse", "dense", "layer", "weight"]) for _ in range(6)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    settings = {
        "config_overrides": SIZES,
        "dataset": "text",
        "data_file": str(folder / "text.txt"),
        "cache_dir": str(folder / "cache"),
        "window": WINDOW,
        "max_eval_bytes": 203,
        "density": 0.25,
        "backward_density": 0.5,
        "refresh_every": 3,
        "max_steps": STEPS,
        "save_steps": 4,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "sample_tokens": 10,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """One dense and one sparse run: their results by kind."""
    return {kind: run(folder, kind) for kind in ("dense", "sparse")}


def run(folder, kind, *command_line):
    sparse = str(kind == "sparse")
    output_dir = str(folder / kind)
    return main([str(folder / "config.yaml"), "--sparse", sparse, "--output_dir", output_dir, *command_line])


def bits_per_byte_of_saved_model(output_dir, text):
    """Bits per byte from the saved files alone, window by window."""
    model = AutoModelForCausalLM.from_pretrained(output_dir).eval()
    total = 0.0
    for window in EvaluationWindows(np.frombuffer(text, np.uint8), WINDOW, ord("\n"), "test"):
        with torch.no_grad():
            loss = model(**{name: tensor[None] for name, tensor in window.items()}).loss
        total += loss.item() * int((window["labels"] != -100).sum())
    return total / len(text) / math.log(2)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_results_are_those_of_the_saved_model(runs, folder, kind):
    results = runs[kind]
    assert json.loads((folder / kind / "results.json").read_text()) == results
    text = (folder / "text.txt").read_bytes()
    valid_start, test_start = (text.rfind(b"\n", 0, len(text) * percent // 100) + 1 for percent in (90, 95))
    for name, start in (("valid", valid_start), ("test", test_start)):
        expected = bits_per_byte_of_saved_model(folder / kind, text[start : start + 203])
        assert results[f"{name}_bits_per_byte"] == pytest.approx(expected, rel=1e-4)
        assert results[f"{name}_bytes"] == 203
    assert results["valid_bits_per_byte"] < 8, "8 is what a model without training needs"
    assert results["steps"] == STEPS
    assert results["tokens"] == STEPS * 4 * WINDOW
    assert results["seed"] == 42
    assert results["train_seconds"] > 0
    assert results["versions"]["hf_topkast"] == hf_topkast.__version__


def test_sizes_of_a_dense_and_a_sparse_run(runs):
    dense, sparse = runs["dense"], runs["sparse"]
    projections = 2 * (4 * 32**2 + 2 * 32 * 64)
    assert dense["density"] == dense["backward_density"] == 1
    assert dense["nonzero_parameters"] == dense["parameters"] == sparse["parameters"]
    assert (sparse["density"], sparse["backward_density"]) == (0.25, 0.5)
    assert sparse["nonzero_parameters"] == dense["parameters"] - 0.75 * projections
    assert sparse["state_bytes"] < sparse["dense_state_bytes"] == dense["state_bytes"]
    assert all(run["peak_state_bytes"] == run["state_bytes"] for run in (dense, sparse))


def test_sparse_run_saves_a_sparse_model_and_its_churn(runs, folder):
    assert sparsity_report(AutoModelForCausalLM.from_pretrained(folder / "sparse")).density == 0.25
    assert not sparsity_report(AutoModelForCausalLM.from_pretrained(folder / "dense")).rows
    history = json.loads((folder / "sparse" / "trainer_state.json").read_text())["log_history"]
    assert any("topkast/mask_churn" in entry for entry in history)
    assert any("test_bits_per_byte" in entry for entry in history)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_output_folder_has_card_and_tokenizer(runs, folder, kind):
    card = (folder / kind / "README.md").read_text()
    assert f"A {kind} causal language model, trained from a new gpt2 model on `text`" in card
    assert f"{runs[kind]['test_bits_per_byte']:.4f}" in card
    assert ("25.0%" in card) == (kind == "sparse")
    assert ('`method="topkast"` (Top-KAST, [Jayakumar et al., 2020]' in card) == (kind == "sparse")
    assert AutoTokenizer.from_pretrained(folder / kind)("ab")["input_ids"] == [97, 98]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_resume_ends_where_an_unbroken_run_does(runs, folder, kind):
    checkpoints = sorted(path.name for path in (folder / kind).glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-4", "checkpoint-8"]
    (folder / kind / "checkpoint-8").rename(folder / kind / "aside")
    (folder / kind / "checkpoint-6").mkdir()  # left half-written, and passed over
    resumed = run(folder, kind, "--resume")
    for key in ("valid_bits_per_byte", "test_bits_per_byte", "tokens", "steps"):
        assert resumed[key] == runs[kind][key], key


def test_evaluation_adds_up_batch_by_batch(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    run_clm.prepare_for_evaluation(args)
    assert args.batch_eval_metrics


def test_resume_without_a_checkpoint_is_an_error(folder):
    with pytest.raises(ValueError, match=r"no checkpoint in `output_dir` .*empty"):
        run(folder, "empty", "--resume")
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="Leave `--resume` out"):
        run(folder, "empty", "--resume")


@pytest.mark.parametrize("former", [True, False])
def test_checkpoints_of_an_earlier_run_are_told_of(runs, folder, former, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(run_clm.logger, "warning", said.append)
    args = TrainingArguments(output_dir=str(folder / "sparse" if former else tmp_path), use_cpu=True)
    assert find_checkpoint(args, resume=False) is None
    assert [f"checkpoint-{STEPS} is of an earlier one" in line for line in said] == [True] * former
    args.resume_from_checkpoint = str(folder / "sparse" / "checkpoint-4")
    assert find_checkpoint(args, resume=False) == args.resume_from_checkpoint and len(said) == former


def test_printed_sample_and_final_line(folder, capsys):
    results = run(folder, "printed", "--max_steps", "1")
    printed = capsys.readouterr().out
    assert (
        f"bits_per_byte: valid {results['valid_bits_per_byte']:.4f}, test {results['test_bits_per_byte']:.4f}"
        in printed
    )
    assert "prompt:" in printed and "sample:" in printed
    run(folder, "printed", "--max_steps", "1", "--sample_tokens", "0")
    assert "sample:" not in capsys.readouterr().out


def test_evaluation_during_training(folder):
    """The metric is the one of a whole split also when Trainer evaluates between steps."""
    results = run(folder, "watched", "--eval_strategy", "steps", "--eval_steps", "4")
    history = json.loads((folder / "watched" / "trainer_state.json").read_text())["log_history"]
    watched = [entry["eval_bits_per_byte"] for entry in history if "eval_bits_per_byte" in entry]
    assert len(watched) == 2 and watched[0] > watched[1]
    assert watched[1] == pytest.approx(results["valid_bits_per_byte"])


def test_fine_tuning_starts_from_the_given_model(runs, folder):
    given = ("--model_name_or_path", str(folder / "dense"), "--config_overrides", "null")
    tuned = run(folder, "tuned", *given, "--max_steps", "1", "--learning_rate", "0")
    assert tuned["test_bits_per_byte"] == pytest.approx(runs["dense"]["test_bits_per_byte"], rel=1e-6)
    with pytest.raises(ValueError, match=r"sparse` is sparse already.*densify"):
        run(folder, "tuned", *given[:1], str(folder / "sparse"), *given[2:])
    with pytest.raises(ValueError, match="`window` is 64, but the model reads 32"):
        run(folder, "tuned", *given, "--window", "64")


def test_words_are_counted_for_wikitext(folder, tmp_path):
    data_dir = tmp_path / "wikitext"
    data_dir.mkdir()
    text = (folder / "text.txt").read_text() + "\n"
    for name in ("train", "valid"):
        (data_dir / f"wiki.{name}.raw").write_text(text)
    (data_dir / "wiki.test.raw").write_text("weight\n" + text)
    byte_folder = tmp_path / "tokenizer"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(byte_folder)
    given = ("--dataset", "wikitext103", "--data_dir", str(data_dir), "--tokenizer", str(byte_folder))
    results = run(folder, "words", *given, "--max_steps", "2")
    whole_lines = text[: text.rindex("\n", 0, 203) + 1]
    assert results["valid_words"] == len(whole_lines.split()) + whole_lines.count("\n")
    assert results["valid_bytes"] == len(whole_lines)
    assert results["test_bytes"] != results["valid_bytes"], "each split must be counted by itself"
    model = AutoModelForCausalLM.from_pretrained(folder / "words").eval()
    nats = 0.0
    for window in EvaluationWindows(np.frombuffer(whole_lines.encode(), np.uint8), WINDOW, tokenizer.eos_token_id, ""):
        with torch.no_grad():
            loss = model(**{name: tensor[None] for name, tensor in window.items()}).loss
        nats += loss.item() * int((window["labels"] != -100).sum())
    assert results["valid_word_perplexity"] == pytest.approx(math.exp(nats / results["valid_words"]), rel=1e-3)


def test_misspelt_model_field_is_an_error_before_training(folder):
    with pytest.raises(ValueError, match=r"`n_layers` \(did you mean n_layer"):
        run(folder, "wrong", "--config_overrides", '{"n_layers": 2}')


def test_dropping_evaluation_batches_is_an_error_before_training(folder, monkeypatch):
    monkeypatch.setattr(run_clm, "load_corpus", lambda args: pytest.fail("went on"))
    with pytest.raises(ValueError, match="`dataloader_drop_last`"):
        run(folder, "wrong", "--dataloader_drop_last", "true")


def test_new_model_fits_vocabulary_and_window():
    corpus = Corpus({}, byte_tokenizer(), ord("\n"), "")
    overrides = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_model(ModelArguments(model_type="llama", config_overrides=overrides), corpus, 48)
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (256, 48)
    with pytest.raises(ValueError, match="`window` is 48, but the model reads 40"):
        build_model(ModelArguments(config_overrides=SIZES | {"max_position_embeddings": 40}), corpus, 48)
    with pytest.raises(ValueError, match="`gpt2` knows 100 tokens, but the tokenizer has 256. Leave `vocab_size` out"):
        build_model(ModelArguments(config_overrides=SIZES | {"vocab_size": 100}), corpus, 48)


def test_a_model_that_sees_later_tokens_is_refused():
    corpus = Corpus({}, byte_tokenizer(), ord("\n"), "")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="`bert` predicts tokens from those that come after them.*is_decoder: true"):
        build_model(ModelArguments(model_type="bert", config_overrides=sizes), corpus, 48)
    build_model(ModelArguments(model_type="bert", config_overrides=sizes | {"is_decoder": True}), corpus, 48)


def test_dense_and_sparse_runs_start_from_the_same_weights(folder, monkeypatch):
    started = {}

    def remember(model, *args):
        started[len(started)] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        raise InterruptedError

    monkeypatch.setattr(run_clm, "sparsify", remember)
    with pytest.raises(InterruptedError):
        run(folder, "sparse-start", "--output_dir", str(folder / "start"), "--sparse", "true")
    monkeypatch.setattr(run_clm, "Trainer", lambda model, **kwargs: remember(model))
    with pytest.raises(InterruptedError):
        run(folder, "dense")
    assert started[0].keys() == started[1].keys()
    assert all(torch.equal(tensor, started[1][name]) for name, tensor in started[0].items())


def test_commit_of_a_checkout(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(results_module, "__file__", str(tmp_path / "results.py"))
    assert results_module.current_commit() == git("rev-parse", "HEAD") != ""


def test_an_installed_recipe_has_no_commit(tmp_path, monkeypatch):
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(results_module, "__file__", str(tmp_path / "recipes" / "results.py"))
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: pytest.fail("asked git"))
    assert results_module.current_commit() is None


def test_commit_is_null_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "__file__", str(tmp_path / "results.py"))
    assert results_module.current_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(results_module, "__file__", str(Path(run_clm.__file__)))
    assert results_module.current_commit() is None
