from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.optimization import Adafactor

from hf_topkast import TopKastConfig, TopKastController, register_optimizer, sparsify
from hf_topkast.storage import full
from hf_topkast.storage.change import _Carried
from hf_topkast.storage.parts import lay_out
from hf_topkast.training import optimizer_states
from hf_topkast.training.optimizers import (
    carry_state,
    check_optimizer,
    check_state,
    load_whole_state,
    unwrap_optimizer,
    whole_state,
)


@pytest.fixture
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


REFUSED = {
    "apollo_torch": ["APOLLOAdamW"],
    "bitsandbytes.optim": ["AdamW", "AdEMAMix", "Lion", "PagedAdamW8bit", "RMSprop"],
    "galore_torch": ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit"],
    "grokadamw": ["GrokAdamW"],
    "heavyball": ["ForeachSOAP"],
    "lomo_optim": ["AdaLomo", "Lomo"],
    "optimi": ["Adan"],
    "distributed_shampoo": ["DistributedShampoo"],
    "schedulefree": ["AdamWScheduleFreePaper"],
    "torch.optim": ["Muon"],
    "torchao.optim": ["AdamW4bit", "AdamW8bit"],
    "transformers": ["LayerWiseDummyOptimizer"],
    "__main__": ["AdamWScheduleFree", "Lion"],  # what they keep is not known from a name alone
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in REFUSED for name in REFUSED[module]])
def test_unknown_state_is_refused_by_name(module, name):
    kind = type(name, (torch.optim.Optimizer,), {"__module__": f"{module}.somewhere"})
    values = nn.Parameter(torch.zeros(3))
    message = f"{name} \\({module}.*cannot train sparse layers.*AdamW.*Lion.*register_optimizer\\({name}, fresh"
    with pytest.raises(ValueError, match=message):
        check_optimizer(kind([values], {"lr": 0.1}), {"fc": values}, TopKastConfig())


def test_lbfgs_is_refused():
    values = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="LBFGS"):
        check_optimizer(torch.optim.LBFGS([values]), {"fc": values}, TopKastConfig())


def test_schedule_free_around_another_optimizer_is_refused():
    model = sparsify(nn.Sequential(nn.Linear(8, 8)), density=0.2, target_modules=["0"])
    wrapper = pytest.importorskip("schedulefree").ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="ScheduleFreeWrapper .*cannot train sparse layers"):
        TopKastController(model, wrapper)


def test_steps_inside_the_backward_pass_are_refused():
    values = nn.Parameter(torch.zeros(3))
    optimizer = pytest.importorskip("optimi").AdamW([values], lr=0.1, gradient_release=True)
    with pytest.raises(ValueError, match="AdamW with gradient_release=True.*Set gradient_release=False"):
        check_optimizer(optimizer, {"fc": values}, TopKastConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"exploration_lr_scale": 0.3},
            r"exploration_lr_scale=0\.3 changes values.*ASGD keeps another.*Leave it at 1",
        ),
        ({"penalty_mode": "decoupled"}, "penalty_mode='decoupled' changes values.*ASGD keeps another.*'coupled'"),
    ],
)
def test_values_that_state_mirrors_are_the_optimizers_alone(settings, message):
    def control(kind, **changed):
        config = TopKastConfig(density=0.2, target_modules=["0"], **{**settings, **changed})
        model = sparsify(nn.Sequential(nn.Linear(8, 8)), config)
        return TopKastController(model, kind(model.parameters(), lr=0.1))

    with pytest.raises(ValueError, match=message):
        control(torch.optim.ASGD)
    control(torch.optim.SGD)
    if "penalty_mode" in settings:
        control(torch.optim.ASGD, penalty=0.0)


@pytest.mark.parametrize(
    "kind",
    [
        *("SGD", "Adam", "AdamW", "RMSprop", "Adafactor", "Adagrad"),
        *("Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD"),
    ],
)
def test_supported(kind):
    values = nn.Parameter(torch.zeros(3))
    optimizer = getattr(torch.optim, kind)([values], lr=0.1)
    check_optimizer(optimizer, {"fc": values}, TopKastConfig(penalty_mode="decoupled"))
    assert optimizer.param_groups[0]["params"] == [values]


def test_decoupled_penalty_needs_a_learning_rate():
    values = nn.Parameter(torch.zeros(3))
    optimizer = Adafactor([values], lr=None)
    check_optimizer(optimizer, {"fc": values}, TopKastConfig())
    with pytest.raises(ValueError, match="penalty_mode='decoupled'.*Adafactor has none"):
        check_optimizer(optimizer, {"fc": values}, TopKastConfig(penalty_mode="decoupled"))


def test_state_of_other_weights_is_refused_by_layer():
    values = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([values])
    optimizer.state[values] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"Layer 'fc': Adam keeps a state 'exp_avg' of shape \(2,\).*\(3,\)"):
        check_optimizer(optimizer, {"fc": values}, TopKastConfig())


def test_a_collection_as_state_is_refused_by_layer():
    values = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([values])
    optimizer.state[values] = {"history": [torch.zeros(3)]}
    with pytest.raises(ValueError, match="Layer 'fc': Adam keeps a list as state 'history'"):
        check_optimizer(optimizer, {"fc": values}, TopKastConfig())


def test_a_registered_state_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(optimizer_states, "_REGISTERED", {})
    kind = type("Mine", (torch.optim.Adam,), {})
    register_optimizer(kind, fresh={"exp_avgs": 1.0})
    values = nn.Parameter(torch.zeros(3))
    optimizer = kind([values])
    check_optimizer(optimizer, {"fc": values}, TopKastConfig())  # no step has been taken, so there is no state yet
    values.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match="Layer 'fc': Mine keeps no state 'exp_avgs'.*it keeps 'step', 'exp_avg', "):
        check_state(optimizer, "fc", values)


def test_values_outside_the_optimizer_are_refused_by_layer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="values of layer 'h.0.c_fc'.*after sparsify"):
        check_optimizer(optimizer, {"h.0.c_fc": nn.Parameter(torch.zeros(3))}, TopKastConfig())


def test_unwrap():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    assert unwrap_optimizer(optimizer) is optimizer
    assert unwrap_optimizer(Accelerator(cpu=True).prepare(optimizer)) is optimizer


def with_state(kind=torch.optim.Adam, count=3, **state):
    """A parameter, and an optimizer that keeps this state for it."""
    values = nn.Parameter(torch.arange(count, dtype=torch.float32))
    optimizer = kind([nn.Parameter(torch.zeros(1)), values], lr=0.5)
    optimizer.state[values] = state
    return optimizer, values


def move(optimizer, values, sources, new_state):
    """Moves state as the change of a layer of one matrix does, to slots that had these before."""
    carried = []

    def carry(*vector):
        carried.append(_Carried(*vector, len(sources), in_place=len(sources) == len(values)))

    carry_state(optimizer, SimpleNamespace(layer=SimpleNamespace(values=values), carry=carry), new_state)
    before, now = (lay_out([(count, count)], (1, count), (1, 1))[0] for count in (len(values), len(sources)))
    for vector in carried:
        vector.move(before, now, sources, full(values.detach()))
        vector.finish()


@pytest.mark.parametrize("new_state", ["zero", "mean"])
def test_state_moves_with_its_weight(new_state):
    state = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.tensor([1.0, 2.0, 3.0]),
        "exp_avg_sq": torch.tensor([4.0, 5.0, 6.0]),
        "momentum_buffer": None,
    }
    optimizer, values = with_state(**state)
    move(optimizer, values, torch.tensor([2, -1, 0]), new_state)
    moved = optimizer.state[values]
    assert moved["step"] == 7 and moved["momentum_buffer"] is None
    assert moved["exp_avg"].tolist() == [3.0, 0.0, 1.0]
    assert moved["exp_avg_sq"].tolist() == [6.0, 5.0 if new_state == "mean" else 0.0, 4.0]
    assert moved["exp_avg"] is state["exp_avg"]


def test_state_shrinks_with_the_set():
    optimizer, values = with_state(exp_avg=torch.tensor([1.0, 2.0, 3.0]), scratch=torch.tensor([9.0]))
    move(optimizer, values, torch.tensor([1]), "zero")
    assert optimizer.state[values]["exp_avg"].tolist() == [2.0]
    assert optimizer.state[values]["scratch"].tolist() == [9.0]


def test_newcomers_start_as_their_optimizer_begins():
    sources = torch.tensor([-1, 1, -1])
    optimizer, values = with_state(torch.optim.Rprop, prev=torch.ones(3), step_size=torch.full((3,), 0.1))
    move(optimizer, values, sources, "mean")
    assert optimizer.state[values]["prev"].tolist() == [0, 1, 0]
    assert optimizer.state[values]["step_size"].tolist() == pytest.approx([0.5, 0.1, 0.5])
    optimizer, values = with_state(torch.optim.ASGD, ax=torch.full((3,), 9.0))
    move(optimizer, values, sources, "zero")
    assert optimizer.state[values]["ax"].tolist() == [0, 9, 2]


def test_what_holds_for_the_whole_parameter_stays():
    scratch = torch.tensor([7.0])  # as optimi's Triton kernels keep it
    optimizer, values = with_state(exp_avg=torch.ones(3), mean_square=scratch)
    check_state(optimizer, "fc", values)
    move(optimizer, values, torch.tensor([-1, -1, -1]), "zero")
    assert optimizer.state[values]["mean_square"] is scratch and scratch.tolist() == [7.0]


def test_a_start_of_another_shape_is_an_error(monkeypatch):
    monkeypatch.setattr(optimizer_states, "_REGISTERED", {})
    kind = type("Mine", (torch.optim.Adam,), {})
    register_optimizer(kind, fresh={"exp_avg": lambda group, values: torch.zeros(2)})
    optimizer, values = with_state(kind, exp_avg=torch.ones(3))
    with pytest.raises(ValueError, match=r"state 'exp_avg' has shape \(2,\), where \(1,\) weights enter"):
        move(optimizer, values, torch.tensor([0, 1, -1]), "zero")


def test_sharded_state_moves_with_its_weight(alone):
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    whole = torch.tensor([1.0, 2.0, 3.0])
    values = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer = torch.optim.ASGD([values])
    values.grad = torch.zeros_like(values)
    optimizer.step()
    move(optimizer, values, torch.tensor([-1, 0, -1]), "zero")
    moved = optimizer.state[values]["ax"]
    assert isinstance(moved, DTensor) and moved.full_tensor().tolist() == pytest.approx([1.0, 1.0, 3.0], rel=1e-3)
    saved = whole_state(optimizer)
    assert not isinstance(saved["state"][0]["ax"], DTensor)
    load_whole_state(optimizer, saved)
    assert torch.equal(optimizer.state[values]["ax"].full_tensor(), moved.full_tensor())
