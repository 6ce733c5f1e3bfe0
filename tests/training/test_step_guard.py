"""Steps that end in an error: what was changed for the optimizer's update alone is changed back."""

import copy

import pytest
import torch
from toy_models import loss_of, make_gpt2, token_batches
from toy_training import make_trainer

from hf_topkast import TopKastConfig, TopKastController, sparsify
from hf_topkast.surgery import sparse_layers


class Interrupted(torch.optim.SGD):
    """Plain gradient descent that stops after its first parameters, while `left` is a number."""

    left = None

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for number, parameter in enumerate(group["params"]):
                    if number == self.left:
                        raise KeyboardInterrupt("halted")
                    if parameter.grad is not None:
                        parameter -= group["lr"] * parameter.grad


def alone(optimizer, make):
    return make()


def scheduler_first(optimizer, make):
    optimizer.scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return make()


def scheduler_last(optimizer, make):
    controller = make()
    optimizer.scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return controller


def failing_hook_first(optimizer, make):
    optimizer.register_step_post_hook(lambda *arguments: 1 / 0)
    return make()


def thetas(model):
    return [layer.theta() for _, layer in sparse_layers(model)]


def prepared(order=alone, **settings):
    settings = {"density": 0.3, "refresh_every": 100, "powerprop_alpha": 2.0, "penalty": 0.0, **settings}
    model = sparsify(make_gpt2(dtype=torch.float64), **settings)
    optimizer = Interrupted(model.parameters(), lr=0.1)
    controller = order(optimizer, lambda: TopKastController(model, optimizer))
    loss_of(model, token_batches(1)[0]).backward()
    return model, optimizer, controller


@pytest.mark.filterwarnings("error")  # a scheduler may say that the step was overridden
@pytest.mark.parametrize("order", [alone, scheduler_first, scheduler_last])
def test_values_are_weights_after_an_error(order):
    model, optimizer, controller = prepared(order)
    before, state = thetas(model), copy.deepcopy(model.state_dict())
    optimizer.left = 0
    with pytest.raises(KeyboardInterrupt, match="halted"):
        optimizer.step()
    assert all(torch.allclose(*pair, rtol=1e-12, atol=0) for pair in zip(thetas(model), before))
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-12, atol=0)
    assert controller.step == 0

    optimizer.left = None
    optimizer.step()
    if order is not alone:
        optimizer.scheduler.step()
    undisturbed, other, _ = prepared(order)
    other.step()
    assert controller.step == 1
    for one, two, former in zip(thetas(model), thetas(undisturbed), before):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)
        assert not torch.equal(one, former)


def test_parameters_that_were_stepped_before_the_error_keep_their_step():
    model, optimizer, _ = prepared()
    optimizer.left = 8
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    undisturbed, other, _ = prepared()
    first = thetas(prepared()[0])
    other.step()
    stepped = {id(parameter) for parameter in optimizer.param_groups[0]["params"][:8]}
    layers = [layer for _, layer in sparse_layers(model)]
    assert 0 < sum(id(layer.values) in stepped for layer in layers) < len(layers)
    for layer, done, former in zip(layers, thetas(undisturbed), first):
        expected = done if id(layer.values) in stepped else former
        torch.testing.assert_close(layer.theta(), expected, rtol=1e-12, atol=0)


def test_an_error_of_another_hook():
    model, optimizer, _ = prepared(failing_hook_first)
    before = thetas(model)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    undisturbed, other, _ = prepared()
    other.step()
    for one, two, former in zip(thetas(model), thetas(undisturbed), before):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
        assert not torch.equal(one, former)


def test_a_controller_that_is_removed_leaves_the_optimizer_as_it_was():
    model, optimizer, controller = prepared()
    assert "step" in optimizer.__dict__
    controller.remove()
    assert "step" not in optimizer.__dict__
    plain = Interrupted(sparsify(make_gpt2(), density=0.3).parameters())
    assert "step" not in plain.__dict__

    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    wrapped = optimizer.step
    controller = TopKastController(model, optimizer)
    assert optimizer.step is not wrapped
    controller.remove()
    assert optimizer.step is wrapped and scheduler is not None


def test_a_controller_that_is_removed_after_an_unguarded_step_settles():
    """Accelerate's gradient scaler calls the step as it was before the controller."""
    model, optimizer, controller = prepared()
    before = thetas(model)
    optimizer.left = 0
    with pytest.raises(KeyboardInterrupt):
        type(optimizer).step(optimizer)
    assert not torch.allclose(thetas(model)[0], before[0])
    controller.remove()
    assert all(torch.allclose(*pair, rtol=1e-12, atol=0) for pair in zip(thetas(model), before))


def test_copies_and_compiled_steps_are_guarded():
    torch.compiler.reset()
    copies = [copy.deepcopy(prepared()) for _ in range(2)]
    straight, _, _ = copies[0]
    copies[0][1].step()
    model, optimizer, _ = copies[1]
    before = thetas(model)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    optimizer.left = 0
    with pytest.raises(KeyboardInterrupt):
        step()
    assert all(torch.allclose(*pair, rtol=1e-12, atol=0) for pair in zip(thetas(model), before))
    optimizer.left = None
    step()
    for one, two in zip(thetas(model), thetas(straight)):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-14)


def test_trainer(tmp_path):
    config = TopKastConfig(density=0.3, powerprop_alpha=2.0)
    trainer = make_trainer(tmp_path, config=config, max_steps=3)
    before = thetas(trainer.model)
    optimizer = Interrupted(trainer.model.parameters(), lr=0.1)
    optimizer.left = 0
    trainer.optimizer, trainer.lr_scheduler = optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(torch.allclose(*pair, rtol=1e-5, atol=0) for pair in zip(thetas(trainer.model), before))
