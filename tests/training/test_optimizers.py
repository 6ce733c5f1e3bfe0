import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers.optimization import Adafactor

from hf_topkast.training.optimizers import carry_state, check_optimizer, exclude_from_weight_decay, unwrap_optimizer


@pytest.mark.parametrize("name", ["Muon", "AdamW8bit", "Lion", "AdamWScheduleFree"])
def test_unknown_state_is_refused_by_name(name):
    kind = type(name, (torch.optim.Optimizer,), {})
    values = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=f"{name} .*cannot train sparse layers.*AdamW"):
        check_optimizer(kind([values], {"lr": 0.1}), {"fc": values}, "coupled")


def test_lbfgs_is_refused():
    values = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="LBFGS"):
        check_optimizer(torch.optim.LBFGS([values]), {"fc": values}, "coupled")


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adafactor"])
def test_supported(kind):
    values = nn.Parameter(torch.zeros(3))
    optimizer = getattr(torch.optim, kind)([values], lr=0.1)
    check_optimizer(optimizer, {"fc": values}, "decoupled")
    assert optimizer.param_groups[0]["params"] == [values]


def test_decoupled_penalty_needs_a_learning_rate():
    values = nn.Parameter(torch.zeros(3))
    optimizer = Adafactor([values], lr=None)
    check_optimizer(optimizer, {"fc": values}, "coupled")
    with pytest.raises(ValueError, match="penalty_mode='decoupled'.*Adafactor has none"):
        check_optimizer(optimizer, {"fc": values}, "decoupled")


def test_state_of_other_weights_is_refused_by_layer():
    values = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([values])
    optimizer.state[values] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"Layer 'fc': Adam keeps a state 'exp_avg' of shape \(2,\).*\(3,\)"):
        check_optimizer(optimizer, {"fc": values}, "coupled")


def test_values_outside_the_optimizer_are_refused_by_layer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="values of layer 'h.0.c_fc'.*after sparsify"):
        check_optimizer(optimizer, {"h.0.c_fc": nn.Parameter(torch.zeros(3))}, "coupled")


def test_weight_decay_is_taken_off_the_values_only():
    values, other, alone = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [values, other], "lr": 0.5}, {"params": [alone]}], weight_decay=0.1)
    exclude_from_weight_decay(optimizer, {"a": values, "b": alone})
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(values): 0.0, id(other): 0.1, id(alone): 0.0}
    assert optimizer.param_groups[-1]["lr"] == 0.5
    assert len(optimizer.param_groups) == 3  # `alone` needed no group of its own


def test_groups_under_a_scheduler_are_not_split():
    values, other = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([values, other], weight_decay=0.1)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(ValueError, match="before the scheduler"):
        exclude_from_weight_decay(optimizer, {"fc": values})


def test_a_group_of_their_own_is_left_alone_under_a_scheduler():
    values, weight = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    groups = [{"params": [values], "weight_decay": 0.0}, {"params": [weight]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    exclude_from_weight_decay(optimizer, {"fc": values})
    assert [(group["params"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ([values], 0.0),
        ([weight], 0.1),
    ]


def test_unwrap():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    assert unwrap_optimizer(optimizer) is optimizer
    assert unwrap_optimizer(Accelerator(cpu=True).prepare(optimizer)) is optimizer


@pytest.mark.parametrize("new_state", ["zero", "mean"])
def test_state_moves_with_its_weight(new_state):
    state = {
        "step": torch.tensor(7.0),
        "exp_avg": torch.tensor([1.0, 2.0, 3.0]),
        "exp_avg_sq": torch.tensor([4.0, 5.0, 6.0]),
        "momentum_buffer": None,
    }
    tensors = dict(state)
    carry_state(state, torch.tensor([2, -1, 0]), new_state)
    assert state["step"] == 7 and state["momentum_buffer"] is None
    assert state["exp_avg"].tolist() == [3.0, 0.0, 1.0]
    assert state["exp_avg_sq"].tolist() == [6.0, 5.0 if new_state == "mean" else 0.0, 4.0]
    assert state["exp_avg"] is tensors["exp_avg"]


def test_state_shrinks_with_the_set():
    state = {"exp_avg": torch.tensor([1.0, 2.0, 3.0])}
    carry_state(state, torch.tensor([1]), "zero")
    assert state["exp_avg"].tolist() == [2.0]
