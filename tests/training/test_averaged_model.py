"""The running average against torch's own, of a dense model that goes through the same weights."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from toy_models import make_gpt2, make_llama, token_batches
from toy_training import same_weights

from hf_topkast import TopKastAveragedModel, TopKastController, sparsify
from hf_topkast.surgery import sparse_layers


AVERAGES = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "one by one": {"avg_fn": get_ema_avg_fn(0.8)},
    "equal": {},
}


def trained_on(model, controller, batches):
    for tokens in batches:
        model(input_ids=tokens, labels=tokens).loss.backward()
        controller.optimizer.step()
        controller.optimizer.zero_grad()
        yield


def controlled(model):
    return TopKastController(model, torch.optim.AdamW(model.parameters(), lr=3e-2))


@torch.no_grad()
def write_theta(dense, model):
    """Gives a dense model the θ, biases and dense weights of a sparse one."""
    layers = dict(sparse_layers(model))
    for name, parameter in dense.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        parameter.copy_(model.get_parameter(name) if layer is None else layer.dense_weight())


def same_sets(model, other):
    pairs = zip(sparse_layers(model), sparse_layers(other))
    masks = ("active_mask", "backward_mask")
    return all(torch.equal(getattr(a, mask), getattr(b, mask)) for (_, a), (_, b) in pairs for mask in masks)


def follow(make_model, average, steps=8, **config):
    """Trains a sparse model and averages it, and by torch's class a dense one with its θ; checks each update."""
    dense = make_model()
    model = sparsify(copy.deepcopy(dense), **{"density": 0.2, "refresh_every": 2, "penalty": 1e-2, **config})
    controller = controlled(model)
    ema, reference = TopKastAveragedModel(model, **average), AveragedModel(dense, **average)
    changes = 0
    for _ in trained_on(model, controller, token_batches(steps)):
        changes += not same_sets(ema.module, model)
        ema.update_parameters(model)
        write_theta(dense, model)
        reference.update_parameters(dense)
        assert same_sets(ema.module, model)
        averages = copy.deepcopy(dense)
        write_theta(averages, ema.module)
        for (name, found), expected in zip(averages.named_parameters(), reference.module.parameters()):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: name + text)
    assert changes > 2
    assert ema.n_averaged == steps
    return model, ema, averages


@pytest.mark.parametrize("average", AVERAGES.values(), ids=list(AVERAGES))
def test_as_torchs_average_of_a_dense_model(make_model, average):
    model, ema, averages = follow(make_model, average)
    with torch.no_grad():
        for name, layer in sparse_layers(ema.module):
            averages.get_submodule(name).weight.mul_(layer.active_mask)
        tokens = token_batches(1, seed=5)[0]
        torch.testing.assert_close(ema(input_ids=tokens).logits, averages(input_ids=tokens).logits)
        assert not torch.allclose(ema(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-2)
    assert ema.module.topkast.step == 8


@pytest.mark.parametrize(
    "config",
    [
        {"block_size": [4, 4], "scatter_blocks": True},
        {"reservoir_device": "cpu"},
        {"reservoir_device": "disk"},
        {"explore_until": 5},
        {"backward_density": 1.0},
        {"initial_density": 0.6, "schedule_begin": 0, "schedule_end": 6},
        {"split_fused": True},
        {"distribution": "global"},
    ],
    ids=str,
)
def test_whatever_the_sets_do(config):
    model, ema, _ = follow(make_gpt2, AVERAGES["ema"], **config)
    for (_, mine), (_, live) in zip(sparse_layers(ema.module), sparse_layers(model)):
        assert mine.reservoir_use == live.reservoir_use
        assert mine.reservoir.data_ptr() != live.reservoir.data_ptr() or not live.reservoir.numel()


def test_several_refreshes_between_two_updates():
    model = sparsify(make_gpt2(), density=0.2, refresh_every=1)
    ema = TopKastAveragedModel(model, **AVERAGES["ema"])
    ema.update_parameters(model)
    want = {name: layer.dense_weight() for name, layer in sparse_layers(model)}
    for _ in trained_on(model, controlled(model), token_batches(4)):
        pass
    ema.update_parameters(model)
    for (name, layer), (_, mine) in zip(sparse_layers(model), sparse_layers(ema.module)):
        torch.testing.assert_close(mine.dense_weight(), want[name].lerp(layer.dense_weight(), 0.2))
        assert mine.reservoir_use == layer.reservoir_use


def test_state_dict_is_exact():
    model = sparsify(make_llama(), density=0.2, refresh_every=2)
    first = TopKastAveragedModel(model, **AVERAGES["ema"])
    second = TopKastAveragedModel(copy.deepcopy(model), **AVERAGES["ema"])
    for step, _ in enumerate(trained_on(model, controlled(model), token_batches(7))):
        if step == 4:
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            assert same_weights(first, second)
        first.update_parameters(model)
        if step >= 4:
            second.update_parameters(model)
    assert same_weights(first, second)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_buffers_as_in_torch(use_buffers):
    dense = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 8))
    model = sparsify(copy.deepcopy(dense), density=0.3, refresh_every=1, target_modules=["0", "2"])
    average = {**AVERAGES["ema"], "use_buffers": use_buffers}
    ema, reference = TopKastAveragedModel(model, **average), AveragedModel(dense, **average)
    controller = controlled(model)
    for x in torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(0)):
        model(x).square().mean().backward()
        controller.optimizer.step()
        write_theta(dense, model)
        for name, buffer in dense.named_buffers():
            buffer.copy_(model.get_buffer(name))
        ema.update_parameters(model)
        reference.update_parameters(dense)
    for name, buffer in reference.module.named_buffers():
        torch.testing.assert_close(ema.module.get_buffer(name), buffer)
    assert same_sets(ema.module, model)
    live = model.get_buffer("1.running_mean")
    assert torch.allclose(ema.module.get_buffer("1.running_mean"), live) != use_buffers


def test_a_dense_model_as_in_torch():
    model = make_gpt2()
    ours, theirs = TopKastAveragedModel(model, **AVERAGES["ema"]), AveragedModel(model, **AVERAGES["ema"])
    for _ in range(3):
        for average in (ours, theirs):
            average.update_parameters(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
    assert same_weights(ours, theirs)


def test_the_trained_model_is_left_alone():
    first, second = (sparsify(make_gpt2(), density=0.2, refresh_every=2) for _ in range(2))
    ema = TopKastAveragedModel(first, **AVERAGES["ema"])
    for _ in trained_on(first, controlled(first), token_batches(5)):
        ema.update_parameters(first)
    for _ in trained_on(second, controlled(second), token_batches(5)):
        pass
    assert same_weights(first, second)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrappers_are_looked_into(one_process):
    model = sparsify(make_gpt2(), density=0.2, refresh_every=1)
    averages = []
    for wrap in (lambda bare: bare, DistributedDataParallel, torch.compile):
        mine = copy.deepcopy(model)
        wrapped = wrap(mine)
        ema = TopKastAveragedModel(wrapped)
        for _ in trained_on(mine, controlled(mine), token_batches(2)):
            ema.update_parameters(wrapped)
        averages.append(ema)
    assert all(same_weights(averages[0], other) for other in averages[1:])


def test_a_sharded_model_is_refused(one_process):
    model = sparsify(make_gpt2(), density=0.2)
    ema = TopKastAveragedModel(model)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    for use in (TopKastAveragedModel, ema.update_parameters):
        with pytest.raises(ValueError, match="FSDP2 has sharded '.*average_models"):
            use(model)


@pytest.mark.parametrize(
    "other",
    [
        make_gpt2,
        lambda: sparsify(make_gpt2(), density=0.2),
        lambda: sparsify(make_gpt2(), density=0.2, block_size=4, scatter_blocks=True),
        lambda: sparsify(make_llama(), density=0.2, block_size=4),
    ],
    ids=["dense", "single weights", "scattered", "llama"],
)
def test_a_model_of_another_kind_is_refused(other):
    ema = TopKastAveragedModel(sparsify(make_gpt2(), density=0.2, block_size=4))
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match=r"see layer '.*' of shape .* Make a new average"):
        ema.update_parameters(other())
    assert all(torch.equal(before[key], value) for key, value in ema.state_dict().items())
