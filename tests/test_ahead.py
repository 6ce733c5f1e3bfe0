import copy
import pickle
import threading

import pytest
import torch
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.ahead import choose_ahead, take_next_sets
from hf_topkast.plan import SetPlan
from hf_topkast.surgery import sparse_info, sparse_layers


@pytest.fixture(params=["same", "cpu", "disk"])
def model(request):
    return sparsify(make_gpt2(), density=0.2, reservoir_device=request.param)


def start(model, choose=None):
    """Starts a choice with the model's own settings, and says what it has to find."""
    layers = dict(sparse_layers(model))
    plan = SetPlan(model, {name: layer.shape for name, layer in layers.items()}, sparse_info(model).config)
    sizes = plan.sizes(0.0, True, lambda name: layers[name].theta())
    expected = {name: plan.choose(name, layer.theta(), sizes[name]) for name, layer in layers.items()}
    plan.choose = choose or plan.choose
    choose_ahead(layers, plan, lambda moments: sizes)
    return layers, expected


def test_later_changes_of_the_values_do_not_count(model):
    with torch.no_grad():
        for _, layer in sparse_layers(model):
            layer.values.copy_(torch.rand(layer.values.shape))
    layers, expected = start(model)
    for layer in layers.values():
        layer.values.data.neg_().exp_()
    for name, layer in layers.items():
        assert all(torch.equal(one, two) for one, two in zip(take_next_sets(layer), expected[name]))
        assert take_next_sets(layer) is None


def test_training_does_not_wait_for_the_choice():
    model = sparsify(make_gpt2(), density=0.2)
    go_on = threading.Event()

    def choose(name, theta, sizes):
        assert go_on.wait(60)
        return torch.ones_like(theta, dtype=torch.bool), torch.ones_like(theta, dtype=torch.bool)

    layers, _ = start(model, choose)
    loss_of(model, token_batches(1)[0]).backward()
    go_on.set()
    assert all(bool(take_next_sets(layer)[0].all()) for layer in layers.values())


def test_sets_do_not_change_while_a_thread_reads_them():
    model = sparsify(make_gpt2(), density=0.2)
    go_on, seen = threading.Event(), []

    def choose(name, theta, sizes):
        go_on.wait(0.2)
        seen.append(name)
        return theta > 0, theta > 0

    layers, _ = start(model, choose)
    last = list(layers.values())[-1]
    last.reassign(last.pattern.active_mask(), last.pattern.active_mask())
    assert len(seen) == len(layers)
    assert last.next_sets is not None  # a choice outlives other changes


def test_an_error_in_the_thread_comes_out_at_the_refresh():
    model = sparsify(make_gpt2(), density=0.2, refresh_every=2, refresh_lag=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = TopKastController(model, optimizer)

    def choose(name, theta, sizes):
        raise MemoryError("no room for another layer")

    plan = controller._refresher._plan
    plan.choose = choose
    first, second = token_batches(2)
    loss_of(model, first).backward()
    optimizer.step()
    loss_of(model, second).backward()
    with pytest.raises(MemoryError, match="no room"):
        optimizer.step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_what_was_chosen(model, copied):
    layers, expected = start(model)
    for name, layer in sparse_layers(copied(model)):
        assert all(torch.equal(one, two) for one, two in zip(take_next_sets(layer), expected[name]))
    assert all(layer.next_sets is not None for layer in layers.values())


def test_state_dict_of_other_shapes_is_refused(model):
    start(model)
    state = model.state_dict()
    key = next(key for key in state if key.endswith("next_sets"))
    state[key] = state[key][:, 1:]
    with pytest.raises(RuntimeError, match="not two sets of"):
        model.load_state_dict(state)


def test_a_state_without_choice_forgets_an_older_one(model):
    state = model.state_dict()
    layers, _ = start(model)
    model.load_state_dict(state)
    assert all(layer.next_sets is None for layer in layers.values())
