import copy

import pytest
import torch
from plain_loop import adamw, train
from toy_models import loss_of, make_gpt2, make_llama, token_batches

from hf_topkast import TopKastConfig, TopKastController, densify, sparsify, sparsity_report
from hf_topkast.surgery import sparse_layers


@pytest.mark.parametrize(("explore_until", "end"), [(4, 4), (0.5, 4), (5, 5), (0, 0)])
def test_exploration_ends_with_b_equal_to_a(make_model, explore_until, end):
    config = TopKastConfig(density=0.2, refresh_every=2, explore_until=explore_until)
    model = sparsify(make_model(), config)
    optimizer = adamw(model.parameters())
    controller = TopKastController(model, optimizer, total_steps=8)
    for step, tokens in enumerate(token_batches(8), start=1):
        shared = 0.2 if step > end else 0.4
        assert all(layer.values.numel() == round(shared * layer.numel) for layer in controller.layers.values())
        active = {name: layer.active_mask for name, layer in controller.layers.items()}
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in controller.layers.items():
            assert torch.equal(layer.active_mask, layer.backward_mask) == (step >= end)
            if step == end and step % 2:
                assert torch.equal(layer.active_mask, active[name])  # B := A, and A stays
            moment = optimizer.state[layer.values]["exp_avg"]
            assert moment.shape == layer.values.shape
            assert moment.untyped_storage().nbytes() == layer.values.nbytes


def test_exploration_that_somebody_ends_does_not_begin_again(make_model):
    config = TopKastConfig(density=0.2, refresh_every=2)

    def start():
        model = sparsify(make_model(), copy.deepcopy(config))
        optimizer = adamw(model.parameters())
        return model, optimizer, TopKastController(model, optimizer)

    def run(model, optimizer, seed):
        for tokens in token_batches(3, seed):
            loss_of(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    first, resumed = start(), start()
    run(*first[:2], seed=0)
    first[2].end_exploration()
    run(*first[:2], seed=1)
    for part, state in zip(resumed, copy.deepcopy([part.state_dict() for part in first])):
        part.load_state_dict(state)
    for model, optimizer, controller in (first, resumed):
        run(model, optimizer, seed=2)
        assert all(layer.values.numel() == layer.active_count for layer in controller.layers.values())


def test_memory_is_given_back_as_density_falls(make_model):
    config = TopKastConfig(
        density=0.2,
        backward_density=0.3,
        refresh_every=2,
        initial_density=0.8,
        schedule_end=6,
        density_schedule="linear",
    )
    model = sparsify(make_model(), config)
    values = {name: layer.values for name, layer in sparse_layers(model)}
    optimizer = adamw(model.parameters())
    controller = TopKastController(model, optimizer)
    for step, tokens in enumerate(token_batches(9), start=1):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
        density = {2: 0.6, 4: 0.4}.get(step - step % 2, 0.2 if step >= 6 else 0.8)
        assert controller.metrics()["topkast/density"] == pytest.approx(density, abs=2e-3)
        assert sparsity_report(model).density == controller.metrics()["topkast/density"]
        for name, layer in controller.layers.items():
            assert layer.values is values[name]
            assert layer.active_count == round(density * layer.numel)
            assert layer.values.numel() == pytest.approx(min(1, 1.5 * density) * layer.numel, abs=1)
            moments = [state for state in optimizer.state[layer.values].values() if state.ndim]
            for tensor in (layer.values.data, *moments):
                assert tensor.numel() == layer.values.numel()
                assert tensor.untyped_storage().nbytes() == layer.values.nbytes


@pytest.mark.parametrize("settings", [{"distribution": "global"}, {"block_size": 4}, {"split_fused": True}], ids=str)
def test_a_schedule_that_has_ended_does_not_begin_again(settings):
    settings = {"density": 0.2, "refresh_every": 1, "initial_density": 1.0, **settings}
    model = sparsify(make_gpt2(), **settings)
    batches = [[tokens] for tokens in token_batches(4)]
    for count in (4, 1, 3):  # the schedule ends after step 2
        _, controller = train(model, None, adamw, batches[:count], total_steps=4)
        controller.remove()
        assert controller.density == pytest.approx(0.2, abs=3e-3)


def test_a_schedule_begins_also_where_all_layers_together_have_their_final_density():
    config = TopKastConfig(
        density=0.25,
        density_overrides={".*q_proj": 0.5},
        initial_density=0.375,
        density_schedule="linear",
        schedule_end=4,
        refresh_every=2,
        target_modules=["q_proj", "o_proj"],
    )
    model = sparsify(make_llama(), config)
    _, controller = train(model, config, adamw, [[tokens] for tokens in token_batches(2)])
    densities = {name.rpartition(".")[2]: layer.density for name, layer in controller.layers.items()}
    assert densities == {"q_proj": 252 / 576, "o_proj": 180 / 576}  # half of the way


def test_schedule_that_ends_after_the_training_is_told(monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_topkast.training.cautions.logger.warning", warnings.append)
    for end in (8, 9):
        model = sparsify(make_gpt2(), density=0.2, initial_density=1.0, schedule_end=end, refresh_every=2)
        TopKastController(model, adamw(model.parameters()), total_steps=8)
    assert len(warnings) == 1 and "schedule_end=9 lies after the last of 8 steps" in warnings[0]


@pytest.mark.parametrize(("steps", "refresh_every", "says"), [(8, 4, True), (8, 3, False), (80, 100, True)])
def test_schedule_without_a_refresh_on_its_way_is_told(steps, refresh_every, says, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_topkast.training.cautions.logger.warning", warnings.append)
    model = sparsify(make_gpt2(), density=0.2, initial_density=1.0, refresh_every=refresh_every)
    TopKastController(model, adamw(model.parameters()), total_steps=steps)
    assert len(warnings) == says
    for message in warnings:
        assert f"refresh_every={refresh_every} no refresh lies between step 0" in message
        assert f"and step {steps // 2}, where it ends: the density goes from 1.0 to 0.2 at once" in message


@pytest.mark.parametrize("initial_density", [1.0, None])
def test_frozen_layers_that_a_schedule_passes_over_are_told(initial_density, monkeypatch):
    warnings = []
    monkeypatch.setattr("hf_topkast.training.cautions.logger.warning", warnings.append)
    model = make_gpt2()
    model.transformer.h[0].requires_grad_(False)
    sparsify(model, density=0.2, initial_density=initial_density, refresh_every=2)
    controller = TopKastController(model, adamw(model.parameters()), total_steps=8)
    assert len(warnings) == (initial_density is not None)
    for message in warnings:
        assert "'transformer.h.0.attn.c_attn' has density 1 and is frozen (4 such layers)" in message
    controller.remove()
    model.requires_grad_(False)  # after a training that has ended the schedule, as adapters do
    for _, layer in sparse_layers(model):
        layer.reassign(*[torch.arange(layer.numel).view(layer.matrix_shape) < layer.numel // 5] * 2)
    model.lm_head.requires_grad_(True)
    TopKastController(model, adamw(model.lm_head.parameters()), total_steps=8)
    assert len(warnings) == (initial_density is not None)


def pruned(make_model):
    """A model that lost its smaller weights, more of them in some layers, as SparseGPT or Wanda leave it."""
    model = make_model()
    with torch.no_grad():
        for place, (_, weight) in enumerate(item for item in model.named_parameters() if "proj" in item[0]):
            if weight.ndim == 2:
                weight[weight.abs() < weight.abs().quantile(0.4 + 0.05 * (place % 8))] = 0
    return model


@pytest.mark.parametrize("backward_density", [None, 0.8])
def test_static_keeps_the_zeros_of_a_pruned_model(make_model, backward_density):
    model = pruned(make_model)
    sparsify(
        model,
        density="nonzero",
        method="static",
        refresh_every=1,
        target_modules=r".*proj",
        backward_density=backward_density,
    )
    zeros = {name: layer.weight == 0 for name, layer in sparse_layers(model)}
    before = {name: layer.weight for name, layer in sparse_layers(model)}
    losses, controller = train(model, None, adamw, [token_batches(1)] * 5)
    assert losses[-1] < losses[0]
    for name, layer in sparse_layers(model):
        assert zeros[name].any() and torch.equal(layer.weight == 0, zeros[name])
        assert not torch.equal(layer.weight, before[name])
    assert "topkast/mask_churn" not in controller.metrics()
    for name, module in densify(model).named_modules():
        if name in zeros:
            assert torch.equal(module.weight == 0, zeros[name])


def test_topkast_goes_on_from_a_pruned_model(make_model):
    model = sparsify(pruned(make_model), density="nonzero", refresh_every=2, explore_until=5, target_modules=r".*proj")
    sizes = {name: layer.active_count for name, layer in sparse_layers(model)}
    first = {name: layer.active_mask for name, layer in sparse_layers(model)}
    losses, controller = train(model, None, adamw, [token_batches(1)] * 4)
    assert losses[-1] < losses[0] and controller.mask_churn > 0
    for name, layer in sparse_layers(model):
        assert layer.active_count == sizes[name] and not torch.equal(layer.active_mask, first[name])
        assert layer.values.numel() == min(layer.numel, 2 * sizes[name])
    controller.step = 5
    controller.refresh()
    assert all(layer.values.numel() == layer.active_count == sizes[name] for name, layer in sparse_layers(model))
