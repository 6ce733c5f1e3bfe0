import copy
from functools import partial

import pytest
import torch
from masked_reference import MaskedTraining, OnMembersOnly
from toy_models import loss_of, make_gpt2, token_batches
from transformers.optimization import Adafactor

from hf_topkast import TopKastConfig, TopKastController, register_optimizer, sparsify
from hf_topkast.surgery import sparse_layers
from hf_topkast.training import optimizer_states
from hf_topkast.training.optimizer_states import state_rule, supported_optimizers


def own_values(group, theta):
    return theta


CASES = {
    "torch.optim.SGD": {"lr": 0.3, "momentum": 0.9, "nesterov": True},
    "torch.optim.Adam": {"lr": 1e-2, "amsgrad": True},
    "torch.optim.NAdam": {"lr": 1e-2},
    "torch.optim.RAdam": {"lr": 5e-2, "betas": (0.8, 0.9)},
    "torch.optim.RMSprop": {"lr": 1e-3, "momentum": 0.5, "centered": True},
    "torch.optim.Adagrad": {"lr": 3e-2, "lr_decay": 0.01, "initial_accumulator_value": 1e-3},
    "torch.optim.Adadelta": {"lr": 10.0},
    "torch.optim.Adamax": {"lr": 2e-2},
    "torch.optim.ASGD": {"lr": 1.0, "lambd": 0.0, "t0": 2},
    "torch.optim.Rprop": {"lr": 3e-3},
    "torch.optim.Adafactor": {"lr": 1e-2},
    "transformers.Adafactor": {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "beta1": 0.8},
    "lion_pytorch.Lion": {"lr": 3e-3},
    "lion_pytorch.foreach.Lion": {"lr": 3e-3},
    "lion_pytorch.cautious_lion.Lion": {"lr": 3e-3},
    "optimi.SGD": {"lr": 0.3, "momentum": 0.9, "dampening": True, "triton": False},
    "optimi.Adam": {"lr": 1e-2, "triton": False},
    "optimi.AdamW": {"lr": 1e-2, "weight_decay": 0.1, "triton": False},
    "optimi.RAdam": {"lr": 5e-2, "betas": (0.8, 0.9), "triton": False},
    "optimi.Lion": {"lr": 3e-3, "triton": False},
    "optimi.Ranger": {"lr": 5e-2, "betas": (0.8, 0.9), "k": 2, "triton": False},
    "optimi.StableAdamW": {"lr": 3e-2, "weight_decay": 0.1, "triton": False},
    "schedulefree.AdamWScheduleFree": {"lr": 2e-2, "warmup_steps": 2},
    "schedulefree.RAdamScheduleFree": {"lr": 5e-2, "betas": (0.9, 0.9), "silent_sgd_phase": False},
    "schedulefree.SGDScheduleFree": {"lr": 1.0},
}

# What state of these names starts at, if not at zero, as their authors begin with it.
STARTS = {
    "sum": lambda group, theta: 1e-3,
    "step_size": lambda group, theta: 3e-3,
    **dict.fromkeys(("ax", "la_param", "z"), own_values),
}

# They divide by a mean over the whole parameter, which is that of B.
LOOK_AT_THE_WHOLE = (
    *("torch.optim.Adafactor", "transformers.Adafactor"),
    *("optimi.StableAdamW", "lion_pytorch.cautious_lion.Lion"),
)


def maker(name):
    """A function of parameters or groups that makes the optimizer of a case."""
    module, _, kind = name.rpartition(".")
    kind = getattr(pytest.importorskip(module), kind)

    def make(groups):
        optimizer = kind(groups, **CASES[name])
        if hasattr(optimizer, "train"):  # schedule-free
            optimizer.train()
        return optimizer

    return make


def step(model, optimizer, tokens):
    optimizer.zero_grad()
    loss = loss_of(model, tokens)
    loss.backward()
    optimizer.step()
    return loss.item()


def simulate(name, config, dense, names):
    seconds = ("sum", "exp_inf", "acc_delta", "variance")
    make = partial(OnMembersOnly, maker(name)) if name in LOOK_AT_THE_WHOLE else maker(name)
    simulation = MaskedTraining(dense, names, config, make, starts=STARTS, second_moments=seconds)
    if name in LOOK_AT_THE_WHOLE:
        simulation.optimizer.masks = [layer.backward_set for layer in simulation.layers.values()]
    return simulation


def check_same(model, simulation):
    for name, layer in sparse_layers(model):
        masked = simulation.layers[name]
        assert torch.equal(layer.pattern.active_mask(), masked.active)
        assert torch.equal(layer.pattern.backward_mask(), masked.backward_set)
        torch.testing.assert_close(layer.theta(), masked.theta.detach(), rtol=1e-6, atol=1e-8)


def entered(model, first):
    """How many weights are in B now that were not at first."""
    return sum(int((layer.backward_mask & ~first[name]).sum()) for name, layer in sparse_layers(model))


@pytest.mark.parametrize("new_state", ["zero", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_weights_and_state_equal_the_masked_simulation(name, new_state):
    config = TopKastConfig(density=0.2, refresh_every=3, penalty=1e-2, new_state=new_state)
    dense = make_gpt2(dtype=torch.float64)
    model = sparsify(copy.deepcopy(dense), config)
    simulation = simulate(name, config, dense, [name for name, _ in sparse_layers(model)])
    first = {name: layer.backward_mask for name, layer in sparse_layers(model)}
    optimizer = maker(name)(model.parameters())
    TopKastController(model, optimizer)
    for tokens in token_batches(10):
        expected = simulation.step([tokens])
        assert step(model, optimizer, tokens) == pytest.approx(expected, rel=1e-7)
    check_same(model, simulation)
    assert entered(model, first) > 50
    for layer_name, layer in sparse_layers(model):
        masked = simulation.layers[layer_name]
        moments = simulation.optimizer.state[masked.theta]
        for key, moment in optimizer.state[layer.values].items():
            if torch.is_tensor(moment) and moment.shape == layer.values.shape:
                expected = moments[key].flatten()[layer.pattern.flat_index()]
                torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in CASES if "schedulefree" in name])
def test_schedule_free_average_equals_the_masked_simulation(name):
    """The parameter is y in training and x in evaluation; a refresh comes between, and training goes on after it."""
    config = TopKastConfig(density=0.2, refresh_every=2, penalty=1e-2)
    dense = make_gpt2(dtype=torch.float64)
    model = sparsify(copy.deepcopy(dense), config)
    simulation = simulate(name, config, dense, [name for name, _ in sparse_layers(model)])
    optimizer = maker(name)(model.parameters())
    TopKastController(model, optimizer)
    batches = token_batches(9)
    for count, tokens in enumerate(batches, start=1):
        simulation.step([tokens])
        step(model, optimizer, tokens)
        if count % 4 == 0:
            in_training = loss_of(model, batches[0]).item()
            optimizer.eval(), simulation.optimizer.eval()
            check_same(model, simulation)
            average = loss_of(model, batches[0]).item()
            assert average == pytest.approx(loss_of(dense, batches[0]).item(), rel=1e-7)
            assert average != pytest.approx(in_training, rel=1e-5)
            optimizer.train(), simulation.optimizer.train()
    check_same(model, simulation)


@pytest.mark.parametrize("name", CASES)
def test_resuming_is_exact(name):
    def begin():
        model = sparsify(make_gpt2(), density=0.2, refresh_every=3, explore_until=7)
        optimizer = maker(name)(model.parameters())
        return model, optimizer, TopKastController(model, optimizer)

    model, optimizer, controller = begin()
    batches = token_batches(10)
    for count, tokens in enumerate(batches):
        if count == 5:
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), controller.state_dict()])
        step(model, optimizer, tokens)
    resumed = begin()
    for part, state in zip(resumed, saved):
        part.load_state_dict(state)
    for tokens in batches[5:]:
        step(*resumed[:2], tokens)
    one, other = model.state_dict(), resumed[0].state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    for layer in controller.layers.values():
        assert layer.values.numel() == layer.active_count  # exploration ended, and state shrank with it
        moments = [each for each in optimizer.state[layer.values].values() if torch.is_tensor(each) and each.ndim]
        assert moments and all(moment.shape == layer.values.shape for moment in moments)


def test_every_known_class_is_there_and_tested():
    tested = {f"{name.partition('.')[0]}.{name.rpartition('.')[2]}" for name in CASES}
    tested.add("torch.AdamW")  # by the controller's tests
    assert tested == set(optimizer_states._KNOWN)
    for name in ("lion_pytorch", "optimi", "schedulefree"):
        module = pytest.importorskip(name)
        kinds = [known.rpartition(".")[2] for known in optimizer_states._KNOWN if known.startswith(f"{name}.")]
        assert all(state_rule(getattr(module, kind)) is not None for kind in kinds)


def test_subclasses_are_known_and_namesakes_are_not():
    class Mine(torch.optim.Adagrad):
        pass

    assert state_rule(Mine) is state_rule(torch.optim.Adagrad) is not None
    assert state_rule(type("Adagrad", (torch.optim.Optimizer,), {})) is None
    assert state_rule(type("Lion", (torch.optim.Optimizer,), {"__module__": "bitsandbytes.optim.lion"})) is None
    assert state_rule(Adafactor) is not None


class Averaging(torch.optim.Optimizer):
    """SGD with each weight's running average, its own step size, and its number of steps."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = parameter.clone()
                    state["size"] = torch.full_like(parameter, group["lr"])
                    state["count"] = torch.ones_like(parameter)
                state["size"].mul_(0.99)
                state["count"].add_(1)
                parameter.sub_(state["size"] * parameter.grad)
                state["average"].lerp_(parameter, 0.5)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(optimizer_states, "_REGISTERED", {})


def test_a_registered_class_trains_as_the_masked_simulation(registry):
    fresh = {"average": own_values, "size": lambda group, values: group["lr"], "count": 1}
    with pytest.raises(ValueError, match="Averaging.*register_optimizer"):
        TopKastController(sparsify(make_gpt2(), density=0.2), Averaging(make_gpt2().parameters()))
    register_optimizer(Averaging, fresh=fresh, mirrors_values=True)
    assert "Averaging (" in supported_optimizers()
    config = TopKastConfig(density=0.2, refresh_every=3, penalty=1e-2)
    dense = make_gpt2(dtype=torch.float64)
    model = sparsify(copy.deepcopy(dense), config)
    starts = {"average": own_values, "size": lambda group, theta: 1.0, "count": lambda group, theta: 1.0}
    kind = type("Mine", (Averaging,), {})
    make = partial(kind, lr=1.0)
    simulation = MaskedTraining(dense, [name for name, _ in sparse_layers(model)], config, make, starts=starts)
    optimizer = make(model.parameters())
    controller = TopKastController(model, optimizer)
    for tokens in token_batches(10):
        simulation.step([tokens])
        step(model, optimizer, tokens)
    check_same(model, simulation)
    for name, layer in sparse_layers(model):
        dense_state = simulation.optimizer.state[simulation.layers[name].theta]
        for key, state in controller.optimizer.state[layer.values].items():
            expected = dense_state[key].flatten()[layer.pattern.flat_index()]
            torch.testing.assert_close(state, expected, rtol=1e-6, atol=1e-10)
    counts = torch.cat([optimizer.state[layer.values]["count"] for layer in controller.layers.values()])
    assert counts.unique().tolist() == [2, 5, 8, 11]  # since the refreshes after steps 9, 6 and 3, and from the start


def test_the_nearest_registered_class_counts(registry):
    kind = type("Mine", (torch.optim.Adam,), {})
    register_optimizer(kind, second_moments=["v"])
    register_optimizer(kind, fresh={"v": 2}, second_moments=["v"])
    assert state_rule(kind).fresh == {"v": 2} and state_rule(torch.optim.Adam).fresh == {}


def test_what_cannot_be_registered(registry):
    with pytest.raises(ValueError, match="subclass of torch.optim.Optimizer, got 'Adam'"):
        register_optimizer("Adam")
    with pytest.raises(ValueError, match="LBFGS keeps a history"):
        register_optimizer(torch.optim.LBFGS)
    for start in ("zero", True, float("nan"), None):
        with pytest.raises(ValueError, match=r"fresh\['sum'\] of Averaging must be a finite number"):
            register_optimizer(Averaging, fresh={"sum": start})
