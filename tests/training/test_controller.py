import copy
import re
import time

import pytest
import torch
from masked_reference import MaskedTraining
from toy_models import loss_of, make_gpt2, make_llama, token_batches
from transformers import AutoModelForCausalLM
from transformers.optimization import Adafactor

from hf_topkast import TopKastConfig, TopKastController, densify, sparsify, sparsity_report
from hf_topkast.surgery import sparse_layers


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.3, momentum=0.9)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=False, foreach=False)


def adamw_fused(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True)


def adam(groups):
    return torch.optim.Adam(groups, lr=1e-2, amsgrad=True)


def rmsprop(groups):
    return torch.optim.RMSprop(groups, lr=1e-3)


def adagrad(groups):
    return torch.optim.Adagrad(groups, lr=1e-2)


def adafactor(groups):
    return torch.optim.Adafactor(groups, lr=1e-2)


def train(model, config, make_optimizer, micro_batches, total_steps=None):
    """Losses of a plain loop over lists of micro-batches, with the controller at the end."""
    optimizer = make_optimizer(model.parameters())
    controller = TopKastController(model, optimizer, total_steps=total_steps)
    losses = []
    for batches in micro_batches:
        optimizer.zero_grad()
        parts = [loss_of(model, tokens) / len(batches) for tokens in batches]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    return losses, controller


def compare_with_simulation(
    make_model, config, make_optimizer, steps=10, accumulation=1, dtype=torch.float64, parts=None
):
    dense = make_model(dtype=dtype)
    model = sparsify(copy.deepcopy(dense), config)
    names = [name for name, _ in sparse_layers(model)]
    simulation = MaskedTraining(dense, names, config, make_optimizer, parts)
    batches = token_batches(steps * accumulation)
    micro_batches = [batches[step * accumulation : (step + 1) * accumulation] for step in range(steps)]
    expected = [simulation.step(batch) for batch in micro_batches]
    losses, controller = train(model, config, make_optimizer, micro_batches)
    assert controller.step == steps
    return model, simulation, losses, expected


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


def snapshot(controller):
    """θ and every moment as dense tensors, so that a weight keeps its place."""
    result = {}
    for name, layer in controller.layers.items():
        dense = {"theta": layer.theta().flatten(), "stored": layer.pattern.backward_mask().flatten()}
        for key, moment in controller.optimizer.state[layer.values].items():
            if torch.is_tensor(moment) and moment.ndim:
                dense[key] = torch.full((layer.numel,), float("nan"), dtype=moment.dtype)
                dense[key][layer.pattern.flat_index()] = moment
        result[name] = dense
    return result


@pytest.mark.parametrize("make_optimizer", [sgd, adam, adamw_fused, rmsprop, adafactor])
@pytest.mark.parametrize("new_state", ["zero", "mean"])
def test_refresh_moves_state_with_its_weight(make_model, make_optimizer, new_state):
    config = TopKastConfig(density=0.2, refresh_every=1000, new_state=new_state)
    model = sparsify(make_model(), config)
    _, controller = train(model, config, make_optimizer, [[tokens] for tokens in token_batches(4)])
    with torch.no_grad():  # so that many weights change sets
        for layer in controller.layers.values():
            layer.values[::3] *= 0.01
    before = snapshot(controller)
    means = {
        (name, key): moment.mean()
        for name, layer in controller.layers.items()
        for key, moment in controller.optimizer.state[layer.values].items()
        if torch.is_tensor(moment) and moment.ndim
    }
    controller.refresh()
    after = snapshot(controller)
    assert controller.mask_churn > 0.1
    for name in before:
        stored, was_stored = after[name].pop("stored"), before[name].pop("stored")
        assert torch.equal(after[name].pop("theta"), before[name].pop("theta"))
        assert (stored & ~was_stored).any() and (was_stored & ~stored).any()
        for key, moment in after[name].items():
            assert torch.equal(moment[stored & was_stored], before[name][key][stored & was_stored])
            second = key in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "variance")
            fresh = means[name, key] if second and new_state == "mean" else 0.0
            assert (moment[stored & ~was_stored] == fresh).all()


def test_reservoir_is_untouched_between_refreshes(make_model):
    config = TopKastConfig(density=0.2, refresh_every=1000)
    model = sparsify(make_model(), config)
    before = {name: layer.reservoir.clone() for name, layer in sparse_layers(model)}
    train(model, config, adamw, [[tokens] for tokens in token_batches(5)])
    assert all(torch.equal(layer.reservoir, before[name]) for name, layer in sparse_layers(model))


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
