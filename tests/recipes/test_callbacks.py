import time
from types import SimpleNamespace

import pytest
from callbacks import ChurnLog, Stopwatch, read_churn
from results import count_training_flops, measure_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainerState, TrainingArguments

from hf_topkast import sparsify


@pytest.fixture
def log(tmp_path):
    """A churn log whose trainer pretends refreshes, and a function that runs steps of it."""
    controller = SimpleNamespace(layer_churn=None)
    log = ChurnLog(SimpleNamespace(topkast_controller=controller))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)

    def run(first, last, refreshes):
        state = TrainerState(global_step=first, is_world_process_zero=True)
        log.on_train_begin(args, state, None)
        while state.global_step < last:
            log.on_step_begin(args, state, None)
            state.global_step += 1
            if state.global_step in refreshes:
                controller.layer_churn = dict(refreshes[state.global_step])
            log.on_step_end(args, state, None)

    return run


def test_a_line_for_each_refresh(log, tmp_path):
    log(0, 9, {3: {"a": 0.5}, 6: {"a": 0.5}})
    assert read_churn(tmp_path) == [{"step": 3, "layers": {"a": 0.5}}, {"step": 6, "layers": {"a": 0.5}}]


def test_a_resumed_run_supersedes_what_came_after_its_checkpoint(log, tmp_path):
    log(0, 9, {3: {"a": 0.5}, 6: {"a": 0.4}, 9: {"a": 0.3}})
    with (tmp_path / "churn.jsonl").open("a") as file:
        file.write('{"step": 12, "lay')  # killed while it wrote
    log(5, 7, {6: {"a": 0.1}})
    assert [(line["step"], line["layers"]["a"]) for line in read_churn(tmp_path)] == [(3, 0.5), (6, 0.1)]
    log(0, 3, {3: {"a": 0.7}})
    assert [(line["step"], line["layers"]["a"]) for line in read_churn(tmp_path)] == [(3, 0.7)]


def test_the_last_line_of_a_step_counts(tmp_path):
    assert read_churn(tmp_path) == []
    lines = ['{"step": 6, "layers": {"a": 1}}', '{"step": 3, "layers": {"a": 2}}', '{"step": 6, "layers": {"a": 3}}']
    (tmp_path / "churn.jsonl").write_text("\n".join(lines) + "\n")
    assert [(line["step"], line["layers"]["a"]) for line in read_churn(tmp_path)] == [(3, 2), (6, 3)]


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
