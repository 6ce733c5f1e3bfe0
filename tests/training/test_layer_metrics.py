import time

import pytest
import torch
from plain_loop import sgd, train
from toy_models import make_gpt2, token_batches

from hf_topkast import TopKastConfig, TopKastController, sparsify
from hf_topkast.surgery import sparse_layers


@pytest.mark.parametrize("unfrozen", [False, True])
def test_frozen_layers_have_no_learning_rate_to_show(unfrozen):
    model = sparsify(make_gpt2(), density=0.2, lr_scale=2.0)
    model.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(True)
    controller = TopKastController(model, torch.optim.SGD([model.transformer.wte.weight], lr=0.1))
    model.requires_grad_(unfrozen)  # behind the optimizer, which is told at the next step
    assert "topkast/learning_rate" not in controller.metrics()
    model.requires_grad_(True)
    trained = TopKastController(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert trained.metrics()["topkast/learning_rate"] == pytest.approx(0.2)


def test_metrics():
    config = TopKastConfig(density=0.2, refresh_every=2, penalty=1e-2)
    model = sparsify(make_gpt2(), config)
    controller = TopKastController(model, sgd(model.parameters()))
    assert "topkast/mask_churn" not in controller.metrics()  # no refresh yet
    controller.remove()
    first = {name: layer.active_mask for name, layer in sparse_layers(model)}
    reservoir = {name: ~layer.backward_mask for name, layer in sparse_layers(model)}
    start = time.perf_counter()
    _, controller = train(model, config, sgd, [[tokens] for tokens in token_batches(2)])
    elapsed = time.perf_counter() - start
    metrics = controller.metrics()
    assert metrics["topkast/density"] == pytest.approx(0.2, abs=1e-3)
    assert metrics["topkast/backward_density"] == pytest.approx(0.4, abs=1e-3)
    layers = controller.layers
    left = sum(int((first[name] & ~layer.active_mask).sum()) for name, layer in layers.items())
    assert metrics["topkast/mask_churn"] == left / sum(int(mask.sum()) for mask in first.values())
    used = sum(int((reservoir[name] & layer.active_mask).sum()) for name, layer in layers.items())
    assert metrics["topkast/reservoir_use"] == pytest.approx(
        used / sum(int(mask.sum()) for mask in reservoir.values()), abs=1e-9
    )
    density = metrics["topkast/density"]
    penalty = sum(
        float((layer.dense_weight()[layer.active_mask] ** 2).sum())
        + float((layer.dense_weight()[layer.backward_mask & ~layer.active_mask] ** 2).sum()) / density
        for layer in layers.values()
    )
    assert metrics["topkast/penalty"] == pytest.approx(1e-2 / 2 * penalty, rel=1e-5)
    assert 0 < metrics["topkast/refresh_seconds"] < elapsed
