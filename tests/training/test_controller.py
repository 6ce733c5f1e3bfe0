import copy
import re

import pytest
import torch
from plain_loop import adafactor, adam, adamw, adamw_fused, compare_with_simulation, rmsprop, sgd, train
from torch.nn.utils import prune
from toy_models import loss_of, make_gpt2, token_batches
from transformers.optimization import Adafactor

from hf_topkast import TopKastConfig, TopKastController, sparsify
from hf_topkast.surgery import sparse_layers


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("densities", [(0.2, 0.4), (0.1, 0.2), (0.2, 1.0), (0.3, 0.3)], ids=str)
def test_training_equals_the_masked_simulation(make_model, densities, refresh_every):
    density, backward_density = densities
    config = TopKastConfig(
        density=density, backward_density=backward_density, refresh_every=refresh_every, penalty=1e-2
    )
    _, _, losses, expected = compare_with_simulation(make_model, config, adamw, dtype=torch.float32)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert min(losses) < losses[0]


@pytest.mark.parametrize("make_optimizer", [sgd, adamw, adamw_fused])  # the others: test_optimizer_states.py
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"penalty_mode": "decoupled", "penalty": 0.1},
        {"new_state": "mean"},
        {"exploration_lr_scale": 0.3},
        {"exploration_lr_scale": 0.0, "penalty": 0.0},
        {"penalty_mode": "decoupled", "penalty": 0.03, "exploration_lr_scale": 0.3},  # as for_pretraining has it
    ],
    ids=str,
)
def test_weights_equal_the_masked_simulation(make_model, make_optimizer, settings):
    config = TopKastConfig(density=0.2, refresh_every=3, **{"penalty": 1e-2, **settings})
    model, simulation, losses, expected = compare_with_simulation(make_model, config, make_optimizer, steps=8)
    check_same_weights(model, simulation, losses, expected)


def check_same_weights(model, simulation, losses, expected):
    assert losses == pytest.approx(expected, rel=1e-7)
    for name, layer in sparse_layers(model):
        masked = simulation.layers[name]
        assert torch.equal(layer.pattern.active_mask(), masked.active)
        assert torch.equal(layer.pattern.backward_mask(), masked.backward_set)
        torch.testing.assert_close(layer.theta(), masked.theta.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("block_size", [(4, 1), (2, 8), 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"initial_density": 0.8, "schedule_begin": 0, "schedule_end": 4},
        {"distribution": "global"},
        {"split_fused": True},
        {"scatter_blocks": True},
        {"scatter_blocks": True, "distribution": "global", "initial_density": 0.8, "schedule_end": 4},
    ],
    ids=str,
)
def test_blocks_equal_the_masked_simulation(block_size, settings):
    config = TopKastConfig(
        density=0.2, refresh_every=2, block_size=block_size, explore_until=6, penalty=1e-2, **settings
    )
    parts = {"c_attn": 3} if "split_fused" in settings else None
    model, simulation, losses, expected = compare_with_simulation(make_gpt2, config, adamw, steps=6, parts=parts)
    assert losses == pytest.approx(expected, rel=1e-7)
    for name, layer in sparse_layers(model):
        assert torch.equal(layer.pattern.active_mask(), simulation.layers[name].active)
        torch.testing.assert_close(layer.theta(), simulation.layers[name].theta.detach(), rtol=1e-6, atol=1e-8)


SCHEDULE = {"initial_density": 1.0, "schedule_begin": 2, "schedule_end": 7}


@pytest.mark.parametrize(
    "settings",
    [
        {**SCHEDULE, "density_schedule": "linear"},
        {**SCHEDULE, "density_schedule": "cubic", "backward_density": 0.2},
        {**SCHEDULE, "density_schedule": "cosine", "new_state": "mean", "explore_until": 5, "refresh_every": 1},
        {**SCHEDULE, "initial_density": 0.05, "backward_density": 0.3},  # a rising one
        {"distribution": "global"},
        {**SCHEDULE, "distribution": "global"},
    ],
    ids=str,
)
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_schedules_and_distributions_equal_the_masked_simulation(make_model, make_optimizer, settings):
    config = TopKastConfig(density=0.2, penalty=1e-2, **{"refresh_every": 3, **settings})
    outcome = compare_with_simulation(make_model, config, make_optimizer, steps=9)
    check_same_weights(*outcome)
    assert next(iter(outcome[1].layers.values())).active.float().mean() < 0.5


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reservoir_device": "cpu", "explore_until": 8},
        {**SCHEDULE, "density_schedule": "linear", "distribution": "global"},  # a refresh too early to be chosen ahead
        {"block_size": 4, "exploration_lr_scale": 0.5},
        {"block_size": 4, "scatter_blocks": True},
    ],
    ids=str,
)
def test_sets_chosen_ahead_equal_the_masked_simulation(lag, settings):
    config = TopKastConfig(density=0.2, penalty=1e-2, refresh_every=4, refresh_lag=lag, **settings)
    outcome = compare_with_simulation(make_gpt2, config, adamw, steps=10)
    check_same_weights(*outcome)
    at_once = TopKastConfig(density=0.2, penalty=1e-2, refresh_every=4, **settings)
    other = compare_with_simulation(make_gpt2, at_once, adamw, steps=10)[0]
    sets = [[layer.pattern.columns for _, layer in sparse_layers(model)] for model in (outcome[0], other)]
    assert not all(torch.equal(one, two) for one, two in zip(*sets))


def test_a_refresh_of_ones_own_forgets_what_was_chosen_ahead():
    sets = []
    for lag in (0, 3):
        config = TopKastConfig(density=0.2, refresh_every=4, refresh_lag=lag)
        model = sparsify(make_gpt2(), config)
        _, controller = train(model, config, sgd, [[tokens] for tokens in token_batches(3)])
        assert ("ahead" in controller.state_dict()) == (lag > 0)
        controller.refresh()
        assert "ahead" not in controller.state_dict()
        sets.append([layer.pattern.columns for _, layer in sparse_layers(model)])
    assert all(torch.equal(one, two) for one, two in zip(*sets))


def test_static_sets_are_not_chosen_ahead():
    config = TopKastConfig(density=0.2, refresh_every=4, refresh_lag=3, method="static")
    model = sparsify(make_gpt2(), config)
    _, controller = train(model, config, sgd, [[tokens] for tokens in token_batches(5)])
    assert "ahead" not in controller.state_dict()


def test_parts_of_a_fused_layer_equal_the_masked_simulation():
    config = TopKastConfig(density=0.2, penalty=1e-2, refresh_every=3, split_fused=True)
    check_same_weights(*compare_with_simulation(make_gpt2, config, adamw, steps=8, parts={"c_attn": 3}))


def test_accumulation_equals_the_masked_simulation(make_model):
    config = TopKastConfig(density=0.2, refresh_every=2)
    _, _, losses, expected = compare_with_simulation(make_model, config, adamw, steps=5, accumulation=3)
    assert losses == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_reservoir_device_changes_nothing(make_model, device):
    runs = []
    for place in ("same", device):
        config = TopKastConfig(density=0.2, refresh_every=2, explore_until=4, reservoir_device=place)
        model = sparsify(make_model(), config)
        losses, _ = train(model, config, adamw, [[tokens] for tokens in token_batches(6)])
        runs.append((losses, [layer.theta() for _, layer in sparse_layers(model)]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(first, second) for first, second in zip(runs[0][1], runs[1][1]))


def test_gradient_checkpointing_changes_nothing(make_model):
    config = TopKastConfig(density=0.2, refresh_every=2)
    runs = []
    for checkpointing in (False, True):
        model = sparsify(make_model(), copy.deepcopy(config))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        runs.append(train(model, config, adamw, [[tokens] for tokens in token_batches(5)])[0])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("make_optimizer", [sgd, adam, adamw, adamw_fused, rmsprop, adafactor])
def test_parameter_gradient_and_state_have_b_elements(make_model, make_optimizer):
    config = TopKastConfig(density=0.2, refresh_every=2)
    model = sparsify(make_model(), config)
    parameters = {name: layer.values for name, layer in sparse_layers(model)}
    _, controller = train(model, config, make_optimizer, [[tokens] for tokens in token_batches(5)])
    for name, layer in sparse_layers(model):
        assert layer.values is parameters[name]
        size = round(0.4 * layer.numel)
        assert layer.values.shape == layer.values.grad.shape == (size,)
        moments = [v for v in controller.optimizer.state[layer.values].values() if torch.is_tensor(v) and v.ndim]
        assert moments and all(moment.shape == (size,) for moment in moments)


def test_layer_names_are_those_of_sparsify_inside_a_wrapper(make_model):
    model = make_model()
    name = next(name for name, _ in sparse_layers(sparsify(copy.deepcopy(model), density=0.2)))
    sparsify(model, density=0.2, refresh_every=1, density_overrides={re.escape(name): 0.6})
    wrapper = torch.nn.ModuleDict({"module": model})
    optimizer = adamw(wrapper.parameters())
    controller = TopKastController(wrapper, optimizer)
    loss_of(model, token_batches(1)[0]).backward()
    optimizer.step()
    densities = {name: round(layer.density, 1) for name, layer in controller.layers.items()}
    assert densities.pop(name) == 0.6 and set(densities.values()) == {0.2}


def test_fraction_without_total_steps_is_refused():
    model = sparsify(make_gpt2(), density=0.2, explore_until=0.5)
    with pytest.raises(ValueError, match="explore_until=0.5"):
        TopKastController(model, adamw(model.parameters()))


def test_dense_model_and_unknown_optimizer_are_refused():
    model = make_gpt2()
    with pytest.raises(ValueError, match="no sparse layers.*sparsify"):
        TopKastController(model, adamw(model.parameters()))
    optimizer = adamw(model.parameters())
    sparsify(model, density=0.2)
    with pytest.raises(ValueError, match="does not hold the values of layer 'transformer.h.0"):
        TopKastController(model, optimizer)


def test_second_controller_is_refused():
    model = sparsify(make_gpt2(), density=0.2)
    optimizer = adamw(model.parameters())
    first = TopKastController(model, optimizer)
    with pytest.raises(ValueError, match="has a TopKastController already"):
        TopKastController(model, optimizer)
    first.remove()
    TopKastController(model, optimizer)


def test_weights_loaded_behind_the_controller_are_noticed(make_model):
    model = sparsify(make_model(), density=0.2, refresh_every=2)
    optimizer = adamw_fused(model.parameters())
    controller = TopKastController(model, optimizer)
    saved = []
    for tokens in token_batches(3):
        loss_of(model, tokens).backward()
        optimizer.step()
        saved.append(copy.deepcopy([part.state_dict() for part in (model, optimizer, controller)]))
    model.load_state_dict(saved[0][0])
    with pytest.raises(ValueError, match="got other weights.*controller.load_state_dict"):
        optimizer.step()
    optimizer.load_state_dict(saved[0][1])
    controller.load_state_dict(saved[0][2])
    loss_of(model, token_batches(1)[0]).backward()
    optimizer.step()
    assert controller.step == 2


def test_values_pruned_behind_the_controller_are_noticed():
    model = sparsify(make_gpt2(), density=0.2, refresh_every=2)
    optimizer = sgd(model.parameters())
    controller = TopKastController(model, optimizer)
    layer = controller.layers["transformer.h.0.mlp.c_fc"]
    prune.l1_unstructured(layer, "values", amount=0.3)
    loss_of(model, token_batches(1)[0]).backward()
    with pytest.raises(ValueError, match="'transformer.h.0.mlp.c_fc' has no parameter 'values'.*prune.remove"):
        optimizer.step()
    prune.remove(layer, "values")
    for tokens in token_batches(3):
        loss_of(model, tokens).backward()
        optimizer.step()
    assert controller.step == 3


def test_layer_unfrozen_behind_the_optimizer_is_named():
    model = sparsify(make_gpt2(), density=0.2)
    frozen = model.transformer.h[0].mlp.c_fc.values.requires_grad_(False)
    optimizer = adamw([parameter for parameter in model.parameters() if parameter.requires_grad])
    TopKastController(model, optimizer)
    frozen.requires_grad_(True)
    loss_of(model, token_batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.mlp\.c_fc' has a gradient.*unfrozen"):
        optimizer.step()
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert len(optimizer.param_groups) == 1
    before = frozen.detach().clone()
    optimizer.add_param_group({"params": [frozen]})
    optimizer.step()
    assert len(optimizer.param_groups) == 2 and not torch.equal(frozen, before)


def test_transformers_adafactor_trains():
    config = TopKastConfig(density=0.2, refresh_every=2)
    model = sparsify(make_gpt2(), config)
    losses, controller = train(model, config, lambda groups: Adafactor(groups, lr=None), [token_batches(1)] * 6)
    assert losses[-1] < losses[0] and controller.mask_churn > 0


def test_nan_at_refresh_names_the_layer():
    model = sparsify(make_gpt2(), density=0.2)
    controller = TopKastController(model, sgd(model.parameters()))
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.values[3] = float("nan")
    before = {name: layer.values.clone() for name, layer in controller.layers.items()}
    with pytest.raises(ValueError, match=r"'transformer\.h\.1\.attn\.c_proj': 1 of its 230"):
        controller.refresh()
    for name, layer in controller.layers.items():
        assert torch.equal(layer.values.nan_to_num(), before[name].nan_to_num())


def test_frozen_layers_keep_still(make_model):
    config = TopKastConfig(density=0.2, refresh_every=2)
    model = sparsify(make_model(), config)
    frozen = next(layer for _, layer in sparse_layers(model))
    frozen.values.requires_grad_(False)
    theta, active = frozen.theta(), frozen.active_mask
    losses, _ = train(model, config, adamw, [[tokens] for tokens in token_batches(4)])
    assert torch.equal(frozen.theta(), theta) and torch.equal(frozen.active_mask, active)
    assert len(set(losses)) == 4


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_skipped_fp16_step_counts_for_nothing(mode):
    model = sparsify(make_gpt2(), density=0.2, refresh_every=1, penalty_mode=mode, exploration_lr_scale=0.5)
    for make_optimizer in (adamw, adamw_fused):
        optimizer = make_optimizer(model.parameters())
        controller = TopKastController(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for overflow in (True, False):
            tokens = token_batches(1)[0]
            scaler.scale(loss_of(model, tokens)).backward()
            if overflow:
                next(iter(controller.layers.values())).values.grad[0] = float("inf")
            thetas = [layer.theta() for layer in controller.layers.values()]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            moved = any(not torch.equal(a, b.theta()) for a, b in zip(thetas, controller.layers.values()))
            assert moved != overflow
        assert controller.step == 1
        controller.remove()


def test_penalty_is_scaled_with_the_gradients_of_a_fused_optimizer():
    thetas = []
    for scale in (1.0, 1024.0):
        model = sparsify(make_gpt2(), density=0.2, refresh_every=1000, penalty=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        controller = TopKastController(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        tokens = token_batches(1)[0]
        scaler.scale(loss_of(model, tokens)).backward()
        scaler.step(optimizer)
        thetas.append([layer.theta() for layer in controller.layers.values()])
    for first, second in zip(*thetas):
        torch.testing.assert_close(first, second)


def test_removed_controller_leaves_the_optimizer_alone():
    config = TopKastConfig(density=0.2, refresh_every=1)
    model = sparsify(make_gpt2(), config)
    _, controller = train(model, config, sgd, [[tokens] for tokens in token_batches(2)])
    controller.remove()
    controller.optimizer.step()
    assert controller.step == 2
