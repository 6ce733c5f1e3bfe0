import logging

import pytest
import torch
from toy_models import make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.surgery import sparse_layers
from hf_topkast.training.penalty import add_penalty, penalty_of, shrink


VALUES = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64)
ACTIVE, DENSITY = 2, 0.25
FACTORS = torch.tensor([1.0, 1.0, 4.0, 4.0], dtype=torch.float64)


def test_the_gradient_is_that_of_the_penalty():
    values = VALUES.clone().requires_grad_()
    (0.1 / 2 * (values.square() * FACTORS).sum()).backward()
    gradient = torch.ones_like(VALUES)
    add_penalty(gradient, VALUES, ACTIVE, DENSITY, 0.1, None)
    torch.testing.assert_close(gradient, 1 + values.grad)
    assert float(penalty_of(VALUES, ACTIVE, DENSITY)) == pytest.approx(float((VALUES.square() * FACTORS).sum()))


def test_a_scaled_gradient_gets_a_scaled_penalty():
    gradient = torch.zeros_like(VALUES)
    add_penalty(gradient, VALUES, ACTIVE, DENSITY, 0.1, torch.tensor(8.0))
    torch.testing.assert_close(gradient, 8 * 0.1 * FACTORS * VALUES)


def test_shrink():
    values = VALUES.clone()
    shrink(values, ACTIVE, DENSITY, 0.1)
    torch.testing.assert_close(values, VALUES * (1 - 0.1 * FACTORS))


@pytest.mark.parametrize("settings", [{"refresh_every": 2}, {"refresh_every": 100}, {"method": "static"}], ids=str)
@pytest.mark.parametrize(("strength", "says"), [(1e-6, False), (10.0, True)])
def test_a_penalty_that_pulls_as_hard_as_the_loss_is_said_once(strength, says, settings, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_topkast"), "propagate", True)
    model = sparsify(make_gpt2(), density=0.2, penalty=strength, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    TopKastController(model, optimizer)
    for tokens in token_batches(4):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    said = [record.message for record in caplog.records if "exploration penalty" in record.message]
    assert len(said) == says
    assert all("penalty=10.0) pulls" in message and "penalty=0" in message for message in said)


@pytest.mark.parametrize("settings", [{"penalty": 0.1}, {"penalty": 0.1, "penalty_mode": "decoupled"}], ids=str)
def test_an_optimizer_that_maximizes_is_penalised_alike(settings):
    """Going up minus the loss is going down the loss."""
    trained = []
    for maximize in (False, True):
        model = sparsify(make_gpt2(), density=0.2, refresh_every=2, **settings)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, maximize=maximize)
        TopKastController(model, optimizer)
        for tokens in token_batches(4):
            loss = model(tokens, labels=tokens).loss
            (-loss if maximize else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([layer.dense_weight() for _, layer in sparse_layers(model)])
    for down, up in zip(*trained, strict=True):
        assert torch.equal(down, up)
