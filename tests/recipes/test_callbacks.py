import logging
import sys
import time

import pytest
import torch
from callbacks import Costs, Progress, Stopwatch, read_churn
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

from hf_topkast import TopKastController, sparsify, sparsity_report
from hf_topkast.layer_log import append_entry
from hf_topkast.layers import expert_stacks
from hf_topkast.surgery import sparse_layers


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
    assert count_training_flops(model, 100) == dense
    head = model.lm_head.weight.numel()
    sparsify(model, density=0.25, backward_density=0.5)
    flops = count_training_flops(model, 100, 4 * 0.25 + 2 * 0.5)
    assert flops["training_flops"] == 100 * (2 * (experts + rest - head) + 6 * head)
    assert flops["dense_training_flops"] == dense["training_flops"]


TINY = GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)


def costs_of(model, steps, costs=None, state=None, **arguments):
    """Trains with a refresh every two steps, and counts at each what a step is going to take."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if any(sparse_layers(model)):
        TopKastController(model, optimizer, **arguments)
    costs, states = costs or Costs(), []
    costs.on_train_begin(None, state or TrainerState(), None, model=model)
    for _ in range(steps):
        costs.on_step_begin(None, None, None, model=model)
        states.append(measure_model(model))
        tokens = torch.randint(0, 32, (2, 8))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return costs, states


def test_costs_of_a_dense_model_are_those_of_all_its_weights():
    projections, head = 2 * 12 * 8**2, 32 * 8
    model = GPT2LMHeadModel(TINY)
    costs, measured = costs_of(model, 3)
    assert costs.flops_per_weight == 3 * 6 and costs.peak_state_bytes == measured[0]["dense_state_bytes"]
    flops = count_training_flops(model, 100, costs.flops_per_weight / 3)
    assert flops == dict.fromkeys(("training_flops", "dense_training_flops"), 600 * (projections + head))


CHANGING = [{"method": "magnitude_pruning"}, {"initial_density": 1.0}, {"explore_until": 8}]


@pytest.mark.parametrize("settings", [{}, *CHANGING])
def test_costs_are_those_of_every_step_and_the_peak(settings):
    torch.manual_seed(0)
    model = sparsify(GPT2LMHeadModel(TINY), density=0.25, refresh_every=2, **settings)
    costs, measured = costs_of(model, 12, total_steps=12)
    assert costs.flops_per_weight == pytest.approx(sum(4 * m["density"] + 2 * m["backward_density"] for m in measured))
    assert costs.peak_state_bytes == max(m["state_bytes"] for m in measured)
    assert (costs.peak_state_bytes > measured[-1]["state_bytes"]) == bool(settings)
    flops = count_training_flops(model, 100, costs.flops_per_weight / 12)
    assert flops["training_flops"] == round(100 * (costs.flops_per_weight / 12 * 2 * 12 * 8**2 + 6 * 32 * 8))


def test_costs_go_on_where_the_checkpoint_was():
    model = sparsify(GPT2LMHeadModel(TINY), density=0.25)
    first, _ = costs_of(model, 2)
    first.peak_state_bytes = 10**9
    resumed, _ = costs_of(model, 3, Costs(), TrainerState(global_step=2, stateful_callbacks=[first]))
    assert resumed.flops_per_weight == pytest.approx(5 * (4 * 0.25 + 2 * 0.5)) and resumed.peak_state_bytes == 10**9
    for costs in (Costs(), first):  # a new run, and a second one of the same trainer
        again, measured = costs_of(model, 1, costs, TrainerState(global_step=0, stateful_callbacks=[first]))
        assert again.flops_per_weight == pytest.approx(2) and again.peak_state_bytes == measured[0]["state_bytes"]


def test_a_checkpoint_without_costs_is_gone_on_from(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("recipes"), "propagate", True)
    model = sparsify(GPT2LMHeadModel(TINY), density=0.25)
    state = TrainerState(global_step=2)
    costs, _ = costs_of(model, 1, Costs(), state)
    assert costs.flops_per_weight == pytest.approx(3 * 2) and "has no count" in caplog.text
    assert state.stateful_callbacks["Costs"]["attributes"]["flops_per_weight"] == pytest.approx(0)
    caplog.clear()
    other = {"Costs": {"args": {}, "attributes": {"passes": 4.0, "peak_state_bytes": 7}}}  # as another version counts
    costs, _ = costs_of(model, 1, Costs(), TrainerState(global_step=2, stateful_callbacks=other))
    assert costs.flops_per_weight == pytest.approx(3 * 2) and "has no count" in caplog.text


def test_experts_count_by_the_weights_that_a_token_meets():
    overrides = {".*experts.*": 0.1}
    model = sparsify(make_family("mixtral"), density=0.5, method="static", density_overrides=overrides)
    costs = Costs()
    costs.on_train_begin(None, TrainerState(), None, model=model)
    costs.on_step_begin(None, None, None, model=model)
    rows = sparsity_report(model).rows
    met = {row.name: row.weights // (2 if row.experts else 1) for row in rows}  # two of four
    expected = sum(met[row.name] * 6 * row.density for row in rows)
    head = model.lm_head.weight.numel()
    assert count_training_flops(model, 1, costs.flops_per_weight)["training_flops"] == pytest.approx(
        expected + 6 * head, abs=1
    )
