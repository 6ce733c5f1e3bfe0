"""Sets that were not chosen for the values beside them are noticed: averages of parameters, buffers and states."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy_models import choose_sets, loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.layers import TopKastLinear
from hf_topkast.storage import change
from hf_topkast.storage.set_watch import digest_of, encode


def make_layer(seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    return TopKastLinear(nn.Linear(10, 7), *choose_sets(torch.rand(7, 10, generator=generator), 0.2, 0.5))


def averaged(one, two, share=0.5):
    return {key: torch.lerp(one[key], two[key], share) if one[key].is_floating_point() else one[key] for key in one}


def test_the_digest_is_in_the_state_and_follows_the_sets():
    layer, other = make_layer(0), make_layer(1)
    assert torch.equal(layer.state_dict()["sets_digest"], encode(digest_of(layer.pattern)))
    assert not torch.equal(layer.sets_digest, other.sets_digest)
    layer.reassign(other.pattern.active_mask(), other.pattern.backward_mask())
    assert torch.equal(layer.sets_digest, other.sets_digest)
    assert torch.equal(layer.to(torch.bfloat16).sets_digest, other.sets_digest)


@pytest.mark.parametrize("share", [0.5, 0.001])
def test_an_average_of_states_is_refused_and_changes_nothing(share):
    layer, other, into = make_layer(0), make_layer(1), make_layer(2)
    before = copy.deepcopy(into.state_dict())
    with pytest.raises(RuntimeError, match="an average of states.*average_models"):
        into.load_state_dict(averaged(layer.state_dict(), other.state_dict(), share))
    assert all(torch.equal(before[key], value) for key, value in into.state_dict().items())


def test_averaged_columns_are_refused():
    layer, other, into = make_layer(0), make_layer(1), make_layer(2)
    state = {key: (value + other.state_dict()[key]) / 2 for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"row_offsets.*torch\.float32: averaged.*average_models"):
        into.load_state_dict(state)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_rounded_state_and_an_average_over_the_same_sets_load(kind):
    layer, twin, into = make_layer(0), make_layer(0), make_layer(2)
    twin.values.data.mul_(2)
    state = averaged(layer.state_dict(), twin.state_dict())
    into.load_state_dict({key: value.to(kind) if value.is_floating_point() else value for key, value in state.items()})
    torch.testing.assert_close(into.values.data, 1.5 * layer.values.data, rtol=1e-2, atol=1e-3)
    assert torch.equal(into.sets_digest, layer.sets_digest)


def test_a_state_of_0_1_0_without_a_digest_loads():
    layer, into = make_layer(0), make_layer(2)
    state = layer.state_dict()
    del state["sets_digest"]
    into.load_state_dict(state)
    assert torch.equal(into.sets_digest, layer.sets_digest)


def test_overwritten_sets_are_an_error_when_they_are_used():
    layer, x = make_layer(0), torch.randn(3, 10)
    layer.columns.copy_(layer.columns.clone())
    with torch.no_grad():
        layer(x[:1])  # the same ones; the product of one token is kept from here on
    layer.columns.copy_(9 - layer.columns.flip(0))
    for use in (lambda: layer(x), layer.dense_weight, lambda: layer(x[:1]), lambda: layer.active_mask):
        with torch.no_grad(), pytest.raises(RuntimeError, match="written over from outside.*average_models"):
            use()
    layer.load_state_dict(make_layer(1).state_dict())
    layer(x)


@pytest.mark.parametrize("mix", ["lerp", "scale and add"])
def test_a_running_average_over_all_of_a_state_dict(mix):
    """As timm's ModelEma does: right while the sets are the same, and an error afterwards."""
    layer, average, x = make_layer(0), make_layer(0), torch.randn(3, 10)

    def update():
        for mean, now in zip(average.state_dict().values(), layer.state_dict().values(), strict=True):
            if not mean.is_floating_point():
                mean.copy_(now)
            elif mix == "lerp":
                mean.lerp_(now, 0.1)
            else:
                mean.mul_(0.9).add_(now, alpha=0.1)

    for _ in range(50):
        layer.values.data.mul_(0.99)
        update()
        average(x)
    make_layer(2).load_state_dict(average.state_dict())
    layer.reassign(*choose_sets(torch.rand(7, 10), 0.2, 0.5))
    update()
    with pytest.raises(RuntimeError, match="written over from outside"):
        average(x)


def test_layers_made_in_inference_mode_and_their_copies():
    with torch.inference_mode():
        layer = make_layer(0)
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(torch.ones(2, 10)), layer(torch.ones(2, 10)))


def test_a_copy_of_overwritten_sets_is_an_error_too(tmp_path):
    layer = make_layer(0)
    layer.columns.copy_(9 - layer.columns.flip(0))
    with pytest.raises(RuntimeError, match="written over from outside"):
        copy.deepcopy(layer).dense_weight()


@pytest.mark.parametrize("way", [lambda m: m.to("cpu"), nn.Module.bfloat16, nn.Module.float])
def test_what_moves_or_casts_a_layer_does_not_hide_it(way):
    layer = make_layer(0)
    layer.columns.copy_(9 - layer.columns.flip(0))
    layer = way(layer)
    with pytest.raises(RuntimeError, match="written over from outside"):
        layer.dense_weight()
    layer = make_layer(0)
    layer.columns.copy_(layer.columns.clone())
    way(layer).dense_weight()


def test_a_whole_state_written_in_place_is_taken():
    layer, other, x = make_layer(0), make_layer(1), torch.randn(3, 10)
    for tensor, new in zip(layer.state_dict().values(), other.state_dict().values(), strict=True):
        tensor.copy_(new)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_torchs_average_over_refreshes_is_an_error(use_buffers):
    model = sparsify(make_gpt2(), density=0.2, refresh_every=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    TopKastController(model, optimizer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)

    def train():
        for tokens in token_batches(4):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            average(token_batches(1)[0])

    with pytest.raises(RuntimeError):
        train()


@pytest.mark.parametrize("part", [("values",), ("row_offsets", "columns"), ("values", "row_offsets", "columns")])
def test_a_part_of_a_layers_state_is_refused(part):
    model, other = (sparsify(make_gpt2(seed), density=0.2) for seed in (0, 1))
    before = copy.deepcopy(model.state_dict())
    state = {name: tensor for name, tensor in other.state_dict().items() if name.endswith(part)}
    with pytest.raises(RuntimeError, match=r"Missing key.*belong together.*model\.state_dict\(\)"):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_state_of_dense_weights_alone_goes_into_a_training():
    model = sparsify(make_gpt2(), density=0.2, refresh_every=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    TopKastController(model, optimizer)
    state = {"transformer.ln_f.weight": torch.full((24,), 2.0), "transformer.h.0.mlp.c_fc.bias": torch.ones(96)}
    for tokens in token_batches(3):
        loss_of(model, tokens).backward()
        optimizer.step()
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_change_of_sets_that_fails_can_be_made_again(monkeypatch):
    layer, other = make_layer(0), make_layer(1)
    theta, masks = layer.theta(), (other.pattern.active_mask(), other.pattern.backward_mask())
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(change, "rearrange", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        layer.reassign(*masks)
    assert layer.assignments % 2 == 1
    layer.reassign(*masks)
    assert layer.assignments % 2 == 0 and torch.equal(layer.sets_digest, other.sets_digest)
    assert torch.equal(layer.theta(), theta)
