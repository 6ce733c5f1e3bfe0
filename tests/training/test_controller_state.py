import copy

import pytest
import torch
from plain_loop import adagrad, adamw, sgd, train
from toy_models import loss_of, make_gpt2, token_batches
from transformers import AutoModelForCausalLM

from hf_topkast import TopKastConfig, TopKastController, sparsify


@pytest.mark.parametrize(
    "settings",
    [
        {"explore_until": 8},
        {"explore_until": 8, "initial_density": 0.9, "schedule_begin": 2, "schedule_end": 10},
        {"initial_density": 0.9, "schedule_end": 7, "distribution": "global"},
        {"density_overrides": {r".*0\..*": 0.5}, "distribution": "erdos_renyi"},
        {"method": "static", "backward_density": 0.3, "explore_until": 8},
        {"refresh_lag": 2, "reservoir_device": "disk", "explore_until": 8},
        {"refresh_lag": 1, "initial_density": 0.9, "schedule_end": 7},
    ],
    ids=str,
)
def test_plain_loop_resumes_bit_by_bit(make_model, tmp_path, settings):
    config = TopKastConfig(density=0.2, refresh_every=3, exploration_lr_scale=0.5, penalty=1e-2, **settings)
    batches = token_batches(12)

    def start():
        model = sparsify(make_model(), copy.deepcopy(config))
        optimizer = adamw(model.parameters())
        return model, optimizer, TopKastController(model, optimizer)

    def run(model, optimizer, batches):
        for tokens in batches:
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
            optimizer.step()

    straight = start()
    run(*straight[:2], batches)
    for cut in (5, 9):
        first = start()
        run(*first[:2], batches[:cut])
        torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
        second = start()
        for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True)):
            part.load_state_dict(state)
        run(*second[:2], batches[cut:])
        expected, got = straight[0].state_dict(), second[0].state_dict()
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_state_of_something_else_is_refused():
    model = sparsify(make_gpt2(), density=0.2)
    controller = TopKastController(model, sgd(model.parameters()))
    with pytest.raises(ValueError, match="integer 'step'"):
        controller.load_state_dict({"epoch": 3})


def test_a_schedule_that_starts_again_is_said_once(monkeypatch, tmp_path):
    warnings = []
    monkeypatch.setattr("hf_topkast.training.cautions.logger.warning", warnings.append)
    config = TopKastConfig(density=0.2, refresh_every=2)
    batches = [[tokens] for tokens in token_batches(3)]
    model = sparsify(make_gpt2(), config)
    _, controller = train(model, config, sgd, batches)
    model.save_pretrained(tmp_path)
    assert not warnings  # a new training

    def go_on(state):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        optimizer = sgd(model.parameters())
        controller = TopKastController(model, optimizer)
        if state is not None:
            controller.load_state_dict(state)
        for tokens in token_batches(2):
            loss_of(model, tokens).backward()
            optimizer.step()
        return controller.step

    assert go_on(controller.state_dict()) == 5 and not warnings
    assert go_on({"step": 0}) == 2 and not warnings
    assert go_on(None) == 2
    assert len(warnings) == 1 and "trained for 3 steps" in warnings[0] and "controller.load_state_dict" in warnings[0]


@pytest.mark.parametrize("make_optimizer", [sgd, adamw, adagrad])
def test_a_schedule_that_starts_again_beside_loaded_moments_is_said(make_optimizer, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_topkast.training.cautions.logger.warning", warnings.append)

    def start(saved=()):
        model = sparsify(make_gpt2(), density=0.2, refresh_every=2)
        optimizer = make_optimizer(model.parameters())
        for part, state in zip((model, optimizer), saved):
            part.load_state_dict(state)
        return model, optimizer, TopKastController(model, optimizer)

    def run(model, optimizer):
        for tokens in token_batches(3):
            loss_of(model, tokens).backward()
            optimizer.step()

    first = start()
    run(*first[:2])
    saved = [copy.deepcopy(part.state_dict()) for part in first]
    resumed = start(saved)
    resumed[2].load_state_dict(saved[2])
    run(*resumed[:2])
    assert not warnings
    run(*start(saved)[:2])
    assert len(warnings) == 1 and "moments of a former training" in warnings[0]
