import copy
import gc
import threading

import pytest
import torch
from toy_models import loss_of, make_gpt2, token_batches

from hf_topkast import TopKastController, sparsify
from hf_topkast.sets import Present, SetPlan
from hf_topkast.surgery import sparse_info, sparse_layers
from hf_topkast.training.ahead import choose_ahead, unpacked


@pytest.fixture(params=["same", "cpu", "disk"])
def model(request):
    return sparsify(make_gpt2(), density=0.2, reservoir_device=request.param)


def start(model, choose=None):
    """Starts a choice with the model's own settings, and says what it has to find."""
    layers = dict(sparse_layers(model))
    plan = SetPlan(model, {name: layer.matrix_shape for name, layer in layers.items()}, sparse_info(model).config)
    sizes = plan.sizes(0.0, True, lambda name, place: layers[name].theta())
    expected = {name: plan.choose(name, layer.theta(), sizes[name]) for name, layer in layers.items()}
    plan.choose = choose or plan.choose

    def present(matrix):
        return Present(1, matrix.pattern.active_mask, matrix.pattern.backward_mask)

    return choose_ahead(["key"], layers, plan, lambda moments: sizes, present), layers, expected


def check(choice, layers, expected):
    sets = choice.sets()
    assert sets.keys() == layers.keys()
    for name, layer in layers.items():
        assert sets[name].dtype == torch.uint8 and sets[name].shape == (2, -(-layer.numel // 8))
        assert all(torch.equal(one, two) for one, two in zip(unpacked(sets[name], layer), expected[name]))


def test_later_changes_do_not_count(model):
    with torch.no_grad():
        for _, layer in sparse_layers(model):
            layer.values.copy_(torch.rand(layer.values.shape))
    choice, layers, expected = start(model)
    for layer in layers.values():
        layer.values.data.neg_().exp_()
    check(choice, layers, expected)
    assert choice.state_dict()["key"] == ["key"]


class Slow:
    """A rule that waits for a sign before it chooses everything."""

    def __init__(self):
        self.go_on = threading.Event()

    def __call__(self, name, theta, sizes, present, place):
        assert self.go_on.wait(60)
        return theta > 0, theta == theta


def test_training_does_not_wait_for_the_choice():
    model, slow = sparsify(make_gpt2(), density=0.2), Slow()
    choice, layers, _ = start(model, slow)
    thetas = {name: layer.theta() for name, layer in layers.items()}
    loss_of(model, token_batches(1)[0]).backward()
    slow.go_on.set()
    check(choice, layers, {name: (theta > 0, theta == theta) for name, theta in thetas.items()})


def test_sets_and_sizes_may_change_meanwhile(model):
    slow = Slow()
    choice, layers, _ = start(model, slow)
    thetas = {name: layer.theta() for name, layer in layers.items()}
    for layer in layers.values():
        active = layer.pattern.active_mask()
        layer.reassign(active, active)
    slow.go_on.set()
    check(choice, layers, {name: (theta > 0, theta == theta) for name, theta in thetas.items()})


class Broken:
    """A rule that fails at the last layer."""

    def __call__(self, name, theta, sizes, present, place):
        if name.endswith("1.mlp.c_proj"):
            raise AttributeError("no such number")
        return theta > 0, theta == theta


@pytest.fixture
def broken():
    """A training whose choice, made after its first step for the second, has failed."""
    model = sparsify(make_gpt2(), density=0.2, refresh_every=2, refresh_lag=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = TopKastController(model, optimizer)
    rule, controller._refresher._plan.choose = controller._refresher._plan.choose, Broken()
    loss_of(model, token_batches(1)[0]).backward()
    optimizer.step()
    yield model, optimizer, controller
    controller._refresher._plan.choose = rule


def test_an_error_in_the_thread_is_raised_at_the_refresh_before_anything_changes(broken):
    model, optimizer, _ = broken
    before = [layer.pattern.columns.clone() for _, layer in sparse_layers(model)]
    with pytest.raises(RuntimeError, match=r"(?s)could not choose the sets of the next refresh.*no such number"):
        optimizer.step()
    assert all(torch.equal(one, layer.pattern.columns) for one, (_, layer) in zip(before, sparse_layers(model)))


def test_an_error_in_the_thread_keeps_no_weights(broken):
    controller = broken[2]
    with pytest.raises(RuntimeError, match="no such number"):
        controller.state_dict()
    assert controller.state_dict(ahead=False)["ahead"] is True
    shapes = {layer.matrix_shape for _, layer in sparse_layers(broken[0])}
    gc.collect()
    alive = [held for held in gc.get_objects() if type(held) is torch.Tensor and tuple(held.shape) in shapes]
    assert not [held for held in alive if held.is_floating_point()]


def test_a_copy_of_a_choice_waits_for_it(model):
    choice, layers, expected = start(model)
    check(copy.deepcopy(choice), layers, expected)


def test_an_error_in_the_thread_spoils_no_other_weights(broken):
    model, _, controller = broken
    model.load_state_dict(model.state_dict())
    controller.load_state_dict({"step": 1})
    controller.end_exploration()
    assert "ahead" not in controller.state_dict()


def test_an_error_in_the_thread_is_raised_by_a_save_of_the_schedule(broken):
    with pytest.raises(RuntimeError, match="no such number"):
        broken[2].state_dict()


def test_a_choice_for_another_model_is_refused():
    controllers = []
    for layers in (2, 1):
        model = sparsify(make_gpt2(), density=0.2, exclude_modules=[] if layers == 2 else ["c_fc"])
        controllers.append(TopKastController(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    choice, *_ = start(sparsify(make_gpt2(), density=0.2))
    state = {"step": 3, "ahead": choice.state_dict()}
    controllers[0].load_state_dict(state)
    with pytest.raises(ValueError, match="chosen ahead, are of another model"):
        controllers[1].load_state_dict(state)
