"""Trainings by every method, against the dense simulation of `masked_methods.py`."""

import copy
import itertools
import math

import pytest
import torch
from masked_methods import AgedAdam, MethodTraining
from toy_models import loss_of, make_gpt2, make_llama, token_batches
from toy_training import make_trainer, same_weights
from transformers import AutoModelForCausalLM

from hf_topkast import TopKastConfig, TopKastController, sparsify
from hf_topkast.surgery import sparse_layers


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.3, momentum=0.9)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, foreach=False)


def aged(warmup):
    """`adamw`, with a step count for each sparse weight."""

    def make(groups):
        rest, sparse = groups
        return AgedAdam({**sparse, "lr": 1e-2}, adamw([rest]), warmup=warmup)

    return make


# Exchanges at the steps 2, 4, 6, 8 and no longer.
EXCHANGE = {"refresh_every": 2, "update_until": 0.75}
SCHEDULE = {"initial_density": 1.0, "schedule_begin": 2, "schedule_end": 9, "refresh_every": 2}
METHODS = {
    "topkast": {"refresh_every": 3},
    "topkast_random": {"refresh_every": 2},
    "static": {"refresh_every": 2},
    "static_random": {"refresh_every": 2},
    "set": EXCHANGE,
    "rigl": EXCHANGE,
    "gse": EXCHANGE,
    "mest": {**EXCHANGE, "drop_share": 0.4},
    "smet": {**EXCHANGE, "update_until": 1.0, "new_state": "zero", "new_state_warmup": 0},
    "magnitude_pruning": SCHEDULE,
    "dpf": SCHEDULE,
}
STEPS = 12


def compare(
    method,
    make_model=make_gpt2,
    make_optimizer=adamw,
    oracle=None,
    steps=STEPS,
    accumulation=1,
    parts=None,
    prepare=None,
    prune=None,
    **settings,
):
    """Trains both, and compares losses, sets and values after every step; gives the sets seen and the controller."""
    config = TopKastConfig(**{"density": 0.2, "penalty": 1e-2, "method": method, **METHODS[method], **settings})
    dense = make_model(dtype=torch.float64)
    if prune is not None:
        prune(dense)
    model = sparsify(copy.deepcopy(dense), config)
    names = [name for name, _ in sparse_layers(model)]
    simulation = MethodTraining(dense, names, config, oracle or make_optimizer, parts, total_steps=steps)
    model.train()
    if prepare is not None:
        prepare(model)
    optimizer = make_optimizer(model.parameters())
    controller = TopKastController(model, optimizer, total_steps=steps)
    batches = token_batches(steps * accumulation)
    seen = []
    for step in range(steps):
        check_same(model, simulation, step)
        seen.append([layer.pattern.active_mask() for _, layer in sparse_layers(model)])
        micro_batches = batches[step * accumulation : (step + 1) * accumulation]
        optimizer.zero_grad()
        loss = 0.0
        for tokens in micro_batches:
            part = loss_of(model, tokens) / accumulation
            part.backward()
            loss += part.item()
        optimizer.step()
        assert loss == pytest.approx(simulation.step(micro_batches), rel=1e-12), step
    check_same(model, simulation, steps)
    return seen, controller


def check_same(model, simulation, step):
    for name, layer in sparse_layers(model):
        masked = simulation.layers[name]
        assert torch.equal(layer.pattern.active_mask(), masked.active), (step, name)
        assert torch.equal(layer.pattern.backward_mask(), masked.backward_set), (step, name)
        assert layer.values.numel() == int(masked.backward_set.sum())
        torch.testing.assert_close(layer.theta(), masked.weight().detach(), rtol=1e-12, atol=1e-12)


def changes(seen):
    """After how many steps some A was another."""
    return sum(any(not torch.equal(*pair) for pair in zip(one, two)) for one, two in itertools.pairwise(seen))


@pytest.mark.parametrize(
    ("make_model", "make_optimizer"),
    [
        (make_gpt2, adamw),
        (make_llama, sgd),
        pytest.param(make_gpt2, sgd, marks=pytest.mark.slow),
        pytest.param(make_llama, adamw, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_the_simulation(method, make_model, make_optimizer):
    seen, _ = compare(method, make_model, make_optimizer)
    expected = {"topkast": 3, "topkast_random": 5, "static": 0, "static_random": 0, "smet": 5, "dpf": 5}
    assert changes(seen) == expected.get(method, 4)


@pytest.mark.parametrize("schedule", ["linear", "cubic", "cosine"])
def test_gradual_pruning_holds_so_many_weights_as_its_schedule_says(schedule):
    seen, controller = compare("magnitude_pruning", density_schedule=schedule)
    left = [1.0, 1.0, 1.0, 1.0, 5 / 7, 5 / 7, 3 / 7, 3 / 7, 1 / 7, 0.0, 0.0, 0.0]  # of the way, after so many steps
    shape = {
        "linear": lambda way: way,
        "cubic": lambda way: way**3,
        "cosine": lambda way: (1 - math.cos(math.pi * way)) / 2,
    }
    for way, sets in zip(left, seen):
        for mask in sets:
            assert int(mask.sum()) == round((0.2 + 0.8 * shape[schedule](way)) * mask.numel())
    for one, two in itertools.pairwise(seen):
        assert not any((later & ~earlier).any() for earlier, later in zip(one, two))  # what is pruned stays out
    assert all(layer.reservoir.numel() == 0 for layer in controller.layers.values())


ALONE = ["set", "rigl", "gse", "mest"]


@pytest.mark.parametrize("accumulation", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["rigl", "gse", "mest"])
def test_gradients_are_those_of_all_micro_batches(method, accumulation):
    compare(method, accumulation=accumulation, steps=6, update_until=6)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "static"])
def test_blocks(method):
    compare(method, block_size=[4, 4])


@pytest.mark.parametrize("method", METHODS)
def test_scattered_blocks(method):
    compare(method, make_optimizer=sgd, block_size=[4, 8], scatter_blocks=True)


@pytest.mark.parametrize("block_size", [[4, 2], pytest.param([1, 1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["topkast_random", "static_random", *ALONE, "smet", "magnitude_pruning"])
def test_parts_of_a_fused_layer(method, block_size):
    compare(method, parts={"c_attn": 3}, split_fused=True, block_size=block_size)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["rigl", "gse", pytest.param("mest", marks=pytest.mark.slow)])
def test_gradient_checkpointing(method, reentrant):
    def prepare(model):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert all(block.gradient_checkpointing for block in model.transformer.h)

    compare(method, prepare=prepare, steps=6, accumulation=2, update_until=6)


def prune(model):
    """Zeros in the projections, of another number in each."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if ".h." in name and parameter.ndim == 2:
            generator = torch.Generator().manual_seed(number)
            parameter.data *= torch.rand(parameter.shape, generator=generator) < 0.1 + 0.02 * number


@pytest.mark.parametrize("method", [*ALONE, "smet"])
def test_a_pruned_model_keeps_its_numbers(method):
    seen, _ = compare(method, prune=prune, density="nonzero")
    assert len({mask.float().mean().item() for mask in seen[0]}) > 4
    assert [mask.sum() for mask in seen[0]] == [mask.sum() for mask in seen[-1]]


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize(
    "method", ["topkast", "topkast_random", "static", "static_random", "magnitude_pruning", "dpf"]
)
def test_powerpropagation(method, make_optimizer):
    compare(method, make_optimizer=make_optimizer, powerprop_alpha=2.0)


@pytest.mark.parametrize(("method", "alpha"), [("topkast", 3.5), ("rigl", 1.0)])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_a_learning_rate_of_their_own(method, alpha, make_optimizer):
    compare(method, make_optimizer=make_optimizer, lr_scale=3.0, powerprop_alpha=alpha, penalty_mode="decoupled")


@pytest.mark.parametrize("settings", [{"new_state_warmup": 3, "lr_scale": 2.0}, {"new_state_warmup": 0}, {}], ids=str)
@pytest.mark.parametrize("method", ["smet", pytest.param("rigl", marks=pytest.mark.slow), "topkast"])
def test_a_step_count_of_each_weight(method, settings):
    settings = {"new_state": "fresh", "new_state_warmup": 100, **settings}
    compare(method, oracle=aged(settings["new_state_warmup"]), **settings)


@pytest.mark.parametrize("settings", [{"exploration_lr_scale": 0.3}, {"explore_until": 7}], ids=str)
@pytest.mark.parametrize("method", ["topkast_random", "static_random", "dpf"])
def test_methods_that_explore(method, settings):
    compare(method, **settings)


@pytest.mark.parametrize("method", ["topkast_random", "set", "smet", "magnitude_pruning"])
def test_sets_chosen_ahead(method):
    compare(method, refresh_lag=1, **({} if method == "magnitude_pruning" else {"refresh_every": 3}))


@pytest.mark.parametrize("initial_density", [0.6, pytest.param(0.1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["set", "rigl", "gse", "mest"])
def test_a_schedule_beside_an_exchange(method, initial_density):
    compare(method, initial_density=initial_density, schedule_begin=0, schedule_end=11, update_until=6)


@pytest.mark.parametrize("decay", ["constant", "cosine", "staged"])
def test_the_share_that_is_exchanged(decay):
    drop_end = {"drop_end": 0.1} if decay == "cosine" else {}
    seen, _ = compare("set", drop_share=0.45, drop_decay=decay, update_until=8, **drop_end)
    shares = {
        "constant": [0.45] * 4,
        "cosine": [0.1 + 0.175 * (1 + math.cos(math.pi * step / 8)) for step in (2, 4, 6, 8)],
        "staged": [0.45, 0.45, 0.45, 0.225],
    }
    for step, share in zip((2, 4, 6, 8), shares[decay]):
        for before, after in zip(seen[step - 1], seen[step]):
            left = int((before & ~after).sum())
            assert 0 < left <= round(share * int(before.sum()))  # some come back at once


KEPT = {"topkast": {}, "topkast_random": {}, "static": {}, "static_random": {}}
RESUMED = {
    **KEPT,
    **{name: {"update_until": 9} for name in ("set", "rigl", "gse", "mest")},
    "smet": {"update_until": 1.0, "new_state_warmup": 4},
    "magnitude_pruning": {"schedule_begin": 2, "schedule_end": 9},
    "dpf": {"schedule_begin": 2, "schedule_end": 9},
}


@pytest.mark.parametrize("method", RESUMED)
def test_resume_is_bit_exact(method, tmp_path):
    config = TopKastConfig(method=method, density=0.2, penalty=1e-3, **{"refresh_every": 3, **RESUMED[method]})
    settings = {"config": config, "save_strategy": "steps", "save_steps": 5, "max_steps": STEPS}
    straight = make_trainer(tmp_path / "straight", **settings)
    straight.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-5"))
    assert resumed.topkast_controller.step == STEPS
    assert same_weights(straight.model, resumed.model)
    states = [trainer.optimizer.optimizer.state_dict()["state"] for trainer in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert state.keys() == states[1][key].keys()
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())
    assert any("entered" in state for state in states[0].values()) == (method == "smet")

    straight.model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_weights(straight.model, loaded)
    tokens = token_batches(1)[0]
    logits = [model.eval()(input_ids=tokens).logits for model in (straight.model, loaded)]
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6)
    for (name, layer), (_, other) in zip(sparse_layers(straight.model), sparse_layers(loaded)):
        assert torch.equal(layer.theta(), other.theta()), name
        outside = ~layer.pattern.backward_mask()
        assert bool(layer.theta()[outside].any()) == (method in KEPT)  # DPF has everything in B

    fresh = sparsify(make_gpt2(seed=1), copy.deepcopy(config))
    fresh.load_state_dict(straight.model.state_dict())
    assert same_weights(straight.model, fresh)
