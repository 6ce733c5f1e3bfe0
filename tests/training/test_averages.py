"""Averages of several models, against averages of dense weights."""

import copy
import weakref

import pytest
import torch
from torch import nn
from toy_models import choose_sets, make_gpt2, make_llama, token_batches
from toy_training import same_weights, trained

from hf_topkast import TopKastConfig, TopKastController, average_models, sparsify
from hf_topkast.surgery import sparse_layers


def dense_weights(model):
    """θ of the sparse layers and all other parameters."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, layer in sparse_layers(model):
        weights[f"{name}.values"] = layer.dense_weight()
    return weights


def mean_of(models, weights):
    parts = [dense_weights(model) for model in models]
    total = sum(weights)
    return {key: sum(w * part[key].double() for w, part in zip(weights, parts)) / total for key in parts[0]}


def make_blocks(**settings):
    return sparsify(make_gpt2(), density=0.2, block_size=4, **settings)


def sizes(model):
    return [(layer.active_count, layer.values.numel()) for _, layer in sparse_layers(model)]


def check_average(average, models, weights):
    found, expected = dense_weights(average), mean_of(models, weights)
    assert found.keys() == expected.keys()
    for key, number in found.items():
        torch.testing.assert_close(number, expected[key].to(number.dtype), atol=1e-6, rtol=1e-6)
    assert sizes(average) == sizes(models[0])


@pytest.mark.parametrize("weights", [None, (1, 2, 0.5), (2.0, -0.5, 0.25)], ids=str)
def test_the_mean_of_dense_weights(make_model, weights):
    models = [trained(make_model, seed) for seed in range(3)]
    before = [copy.deepcopy(model) for model in models]
    average = average_models(models, weights)
    check_average(average, models, weights or (1, 1, 1))
    assert all(same_weights(*pair) for pair in zip(models, before))
    for _, layer in sparse_layers(average):
        active, backward = choose_sets(layer.theta(), 0.2, 0.4)
        assert torch.equal(layer.pattern.active_mask(), active)
        assert torch.equal(layer.pattern.backward_mask(), backward)


def test_equal_models_give_themselves(make_model):
    model = trained(make_model)
    for count in (1, 3):
        average = average_models([model] * count)
        assert same_weights(average, model)
        assert average is not model
        assert not {id(p) for p in average.parameters()} & {id(p) for p in model.parameters()}
        assert average.topkast == model.topkast


def test_common_sets_are_kept():
    model = trained(make_gpt2)
    other = copy.deepcopy(model)
    for _, layer in sparse_layers(other):
        layer.values.data.neg_()  # the average is 0 on B: chosen anew, A would lie outside
    average = average_models([model, other])
    for (_, mine), (_, first) in zip(sparse_layers(average), sparse_layers(model)):
        assert torch.equal(mine.active_mask, first.active_mask)
        assert torch.equal(mine.backward_mask, first.backward_mask)
        assert not mine.values.any()
        assert torch.equal(mine.reservoir, first.reservoir)


@pytest.mark.parametrize(
    "config",
    [
        {"block_size": [4, 4]},
        {"block_size": [4, 4], "scatter_blocks": True},
        {"split_fused": True},
        {"reservoir_device": "disk"},
        {"reservoir_device": "cpu", "backward_density": 1.0},
        {"distribution": "global"},
        {"density_overrides": {r".*c_attn": 0.5}},
    ],
    ids=str,
)
def test_whatever_the_sets_are(config):
    models = [trained(make_gpt2, seed, **config) for seed in range(2)]
    average = average_models(models, (3, 1))
    check_average(average, models, (3, 1))
    controller = TopKastController(average, torch.optim.SGD(average.parameters(), lr=0.0))
    sets = [layer.pattern.backward_mask() for _, layer in sparse_layers(average)]
    if "global" not in config.values():  # which gives the layers other sizes at each refresh
        controller.refresh()
    assert all(
        torch.equal(mask, layer.pattern.backward_mask()) for mask, (_, layer) in zip(sets, sparse_layers(average))
    )


@pytest.mark.parametrize("weights", [None, (1, 2, 0.5), (2.0, -0.5, 0.25)], ids=str)
def test_norms_of_inputs_are_averaged_by_their_squares(make_model, weights):
    models = [trained(make_model, seed, calibration=token_batches(2, seed=seed + 5)) for seed in range(3)]
    average = average_models(models, weights)
    parts = torch.tensor(weights or (1.0, 1.0, 1.0)).abs()
    check_average(average, models, weights or (1, 1, 1))
    for index, (_, layer) in enumerate(sparse_layers(average)):
        norms = torch.stack([list(sparse_layers(model))[index][1].input_norms for model in models])
        expected = (parts @ norms.square() / parts.sum()).sqrt()
        torch.testing.assert_close(layer.input_norms, expected)
        assert not torch.equal(layer.input_norms, norms[0])
        scores = layer.theta().abs() * layer.input_norms
        for row, active in zip(scores, layer.pattern.active_mask()):  # they rank with the new norms
            assert row[active].min() >= row[~active].max()


def test_norms_that_only_some_models_have_are_refused():
    models = [sparsify(make_gpt2(), density=0.2, calibration=token_batches(1)), sparsify(make_gpt2(), density=0.2)]
    for pair, message in ((models, "missing in it and there"), (models[::-1], "there in it and missing")):
        with pytest.raises(ValueError, match=rf"model 1 .*c_attn.input_norms' is {message}.*score"):
            average_models(pair)


def test_parts_keep_their_sizes():
    models = [trained(make_gpt2, seed, split_fused=True) for seed in range(2)]
    average = average_models(models)
    for mine, first in zip(*(dict(sparse_layers(model)).values() for model in (average, models[0]))):
        if mine.matrix_shape == (72, 24):  # c_attn: query, key and value
            masks = [layer.pattern.active_mask().view(3, -1).sum(1) for layer in (mine, first)]
            assert torch.equal(*masks)


def test_pruned_models():
    models = []
    for seed in range(2):
        model = make_gpt2(seed)
        with torch.no_grad():
            for block in model.transformer.h:
                for weight in (block.attn.c_attn.weight, block.mlp.c_fc.weight):
                    weight[weight.abs() < 0.02] = 0
        models.append(sparsify(model, density="nonzero", target_modules=["attn.c_attn", "c_fc"], method="static"))
    average = average_models(models)
    check_average(average, models, (1, 1))
    for _, layer in sparse_layers(average):
        theta = layer.theta().abs()
        active = layer.pattern.active_mask()
        assert theta[active].min() >= theta[~active].max()


def test_half_precision_is_summed_in_float32():
    models = [trained(lambda seed: make_llama(seed, torch.bfloat16), seed) for seed in range(5)]
    average = average_models(models)
    assert {parameter.dtype for parameter in average.parameters()} == {torch.bfloat16}
    expected = mean_of(models, (1,) * 5)
    for key, number in dense_weights(average).items():  # rounded once, by half a unit of the eighth bit at most
        torch.testing.assert_close(number.double(), expected[key], rtol=2**-8, atol=1e-7)


def test_one_model_is_in_memory_at_a_time():
    alive = weakref.WeakSet()
    most = 0

    def models():
        nonlocal most
        for seed in range(4):
            model = sparsify(make_gpt2(seed), density=0.2)
            alive.add(model)
            most = max(most, len(alive))
            yield model
            del model

    average = average_models(models())
    assert most == 1
    check_average(average, [sparsify(make_gpt2(seed), density=0.2) for seed in range(4)], (1,) * 4)


class Shifted(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(8, 8)
        self.register_buffer("mean", torch.full((8,), float(seed)))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("count", torch.tensor(seed))


def test_buffers():
    models = [sparsify(Shifted(seed), density=0.3, target_modules=["first"]) for seed in (1, 2)]
    average = average_models(models)
    assert torch.equal(average.mean, torch.full((8,), 1.5))
    assert torch.equal(average.mask, models[0].mask)
    assert average.count == 1


def test_the_average_trains_on(tmp_path):
    average = average_models(trained(make_gpt2, seed) for seed in range(2))
    average.save_pretrained(tmp_path)
    loaded = type(average).from_pretrained(tmp_path)
    for model in (average.train(), loaded.train()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        TopKastController(model, optimizer)
        for tokens in token_batches(4):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same_weights(average, loaded)


CONFIG = TopKastConfig(density=0.2)


def broken():
    model = sparsify(make_gpt2(1), CONFIG)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.values[3] = torch.inf
    return model


@pytest.mark.parametrize(
    "others, weights, message",
    [
        ([], None, "no model to average"),
        ([make_gpt2], None, "model 0 .GPT2LMHeadModel. has no sparse layer"),
        ([lambda: sparsify(make_gpt2(), CONFIG), make_gpt2], None, "model 1 .* has no sparse layer"),
        ([lambda: sparsify(make_gpt2(), CONFIG)], [1, 2], "2 weights and 1 models"),
        ([lambda: sparsify(make_gpt2(), CONFIG)] * 3, [1, 2], "2 weights and more models"),
        ([lambda: sparsify(make_gpt2(), CONFIG)] * 2, [1, -1], r"weights=\[1.0, -1.0\] .* their sum, 0"),
        ([lambda: sparsify(make_gpt2(), CONFIG)] * 2, [1, float("nan")], "each must be a finite number"),
        (
            [lambda: sparsify(make_gpt2(), CONFIG), lambda: sparsify(make_llama(), CONFIG)],
            None,
            "model 1 is not like the first: '.*' is missing in it",
        ),
        (
            [lambda: sparsify(make_gpt2(), density=0.2), lambda: sparsify(make_gpt2(), density=0.2, block_size=4)],
            None,
            r"'transformer.h.0.attn.c_attn' is .*\(4, 4\).* in it",
        ),
        (
            [lambda: make_blocks(scatter_blocks=True), make_blocks],
            None,
            r"'transformer.h.0.attn.c_attn' is .*False.* in it .*True.*scatter_blocks",
        ),
        ([lambda: sparsify(make_gpt2(), CONFIG), broken], None, "Layer 'transformer.h.0.mlp.c_fc': 1 of its"),
    ],
)
def test_errors(others, weights, message):
    with pytest.raises(ValueError, match=message):
        average_models((make() for make in others), weights)
