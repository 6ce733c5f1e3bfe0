import sys
import time

import pytest
import torch
from callbacks import Progress, Stopwatch, read_churn
from results import count_training_flops, measure_model
from tiny_families import make_family
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from hf_topkast import sparsify
from hf_topkast.layer_log import append_entry
from hf_topkast.layers import expert_stacks


@pytest.fixture
def watched(tmp_path, capsys):
    """A training that is pretended, and what its progress prints."""

    def run(steps, terminal=False, first=0, logs=True, batches=0, **state):
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        state = TrainerState(global_step=first, max_steps=steps, is_world_process_zero=True, **state)
        progress = Progress(bar=terminal)
        progress.on_train_begin(args, state, None)
        for step in range(first + 1, steps + 1):
            state.global_step = step
            progress.on_step_end(args, state, None)
            if logs:
                progress.on_log(args, state, None, logs={"loss": 1 / step, "topkast/mask_churn": 0.25, "epoch": 1.0})
        progress.on_log(args, state, None, logs={"train_runtime": 1.0})
        progress.on_train_end(args, state, None)
        for _ in range(batches):
            progress.on_prediction_step(args, state, None, eval_dataloader=range(batches))
        progress.on_evaluate(args, state, None)
        return capsys.readouterr().err

    return run


def test_a_log_file_gets_twenty_lines(watched):
    lines = watched(1000).splitlines()
    assert len(lines) == Progress.LINES
    assert lines[0].startswith("step 50 of 1,000, 0:00:00 of ") and lines[0].endswith(": loss 0.02, churn 0.25")
    assert lines[-1].startswith("step 1,000 of 1,000")
    assert len(watched(3).splitlines()) == 3
    assert watched(1000, is_local_process_zero=False) == ""


def test_a_resumed_run_goes_on_in_lines_and_time(watched):
    assert [line.split(",")[0] for line in watched(40, first=30).splitlines()] == [
        f"step {n} of 40" for n in range(31, 41)
    ][1::2]


def test_a_training_too_short_for_a_log_says_that_it_ended(watched):
    assert [line[:11] for line in watched(3, logs=False).splitlines()] == ["step 3 of 3"]


def test_a_log_file_is_told_of_the_evaluation(watched):
    assert watched(1, batches=1200).splitlines()[1:] == ["evaluating 1,200 batches"]
    assert watched(1, batches=1200, is_local_process_zero=False) == ""


def test_a_terminal_gets_one_bar(watched, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    said = watched(30, terminal=True)
    assert "30/30" in said and "churn 0.25" in said and said.count("\n") == 1
    assert "0/7" in watched(1, terminal=True, batches=7)


def test_it_takes_over_from_what_prints_dictionaries(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    for quiet in (True, False):
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=quiet)
        trainer = Trainer(model=model, args=args)
        Progress.take_over(trainer)
        kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
        assert Progress in kinds and not kinds & {ProgressCallback, PrinterCallback}


def test_churn_is_read_from_the_layers(tmp_path):
    assert read_churn(tmp_path) == []
    append_entry(tmp_path, 0, {"a": {"density": 0.5}})
    append_entry(tmp_path, 3, {"a": {"density": 0.5, "churn": 0.1}, "frozen": {"density": 0.5}})
    assert read_churn(tmp_path) == [{"step": 3, "layers": {"a": 0.1}}]


def test_seconds_go_on_where_the_checkpoint_was(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Stopwatch()
    watch.on_train_begin(None, TrainerState(global_step=0, stateful_callbacks=[]), None)
    now[0] += 5
    saved = TrainerState(global_step=4, stateful_callbacks=[watch])
    resumed = Stopwatch()
    resumed.on_train_begin(None, saved, None)
    now[0] += 2
    resumed.on_train_end(None, saved, None)
    now[0] += 50
    assert resumed.seconds == 7
    again = Stopwatch()
    again.on_train_begin(None, TrainerState(global_step=0, stateful_callbacks=[watch]), None)
    assert again.seconds == 0


def test_flops_of_experts_are_those_of_the_experts_of_a_token():
    model = make_family("mixtral")  # two blocks of four experts, of which a token comes to two
    experts = sum(stack.weight.numel() for stack in expert_stacks(model).values()) // 2
    rest = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert experts > rest > 0
    dense = dict.fromkeys(("training_flops", "dense_training_flops"), 600 * (experts + rest))
    assert count_training_flops(model, 100, 10, measure_model(model), []) == dense
    head = model.lm_head.weight.numel()
    sparsify(model, density=0.25, backward_density=0.5)
    flops = count_training_flops(model, 100, 10, measure_model(model), [])
    assert flops["training_flops"] == 100 * (2 * (experts + rest - head) + 6 * head)
    assert flops["dense_training_flops"] == dense["training_flops"]


def test_flops_follow_the_logged_densities():
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    projections, head = 2 * 12 * 8**2, 32 * 8
    dense = GPT2LMHeadModel(config)
    flops = count_training_flops(dense, 100, 10, measure_model(dense), [])
    assert flops == dict.fromkeys(("training_flops", "dense_training_flops"), 600 * (projections + head))

    model = sparsify(GPT2LMHeadModel(config), density=0.25, backward_density=0.5)
    at_first = measure_model(model)
    flops = count_training_flops(model, 100, 10, at_first, [{"step": 3, "loss": 1.0}])
    assert flops["training_flops"] == 100 * ((4 * 0.25 + 2 * 0.5) * projections + 6 * head)
    assert flops["dense_training_flops"] == 600 * (projections + head)
    history = [
        {"step": 4, "topkast/density": 0.25, "topkast/backward_density": 0.25},
        {"step": 8, "topkast/density": 0.125, "topkast/backward_density": 0.125},
        {"step": 8, "train_loss": 1.0},
    ]
    flops = count_training_flops(model, 100, 10, at_first, history)
    share = (4 * 2.0 + 4 * 1.5 + 2 * 0.75) / 10
    assert flops["training_flops"] == 100 * (share * projections + 6 * head)
