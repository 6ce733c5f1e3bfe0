import copy

import pytest
import torch
from torch import nn

from hf_topkast.training.own_groups import OwnGroups


def make(decays=(0.1,), kind=torch.optim.SGD):
    """Two parameters a group, the first of which is not to decay, and a group without it at the end."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2 * len(decays) + 1)]
    groups = [{"params": parameters[2 * i : 2 * i + 2], "weight_decay": decay} for i, decay in enumerate(decays)]
    optimizer = kind([*groups, {"params": parameters[-1:], "weight_decay": 0.5}], lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.zeros(3)
    return optimizer, parameters


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_only_the_others_decay(kind):
    optimizer, parameters = make((0.1, 0.0, 0.2), kind)
    own, before = list(optimizer.param_groups), copy.deepcopy(optimizer.state_dict()["param_groups"])
    decay = OwnGroups(optimizer, parameters[::2][:3])
    for _ in range(2):
        decay.begin()
        optimizer.step()
        decay.end()
    assert all(group is other for group, other in zip(optimizer.param_groups, own, strict=True))
    assert optimizer.state_dict()["param_groups"] == before
    left = [1.0, 0.99**2, 1.0, 1.0, 1.0, 0.98**2, 0.95**2]
    assert [float(parameter[0]) for parameter in parameters] == pytest.approx(left)


def test_a_group_of_theirs_alone():
    optimizer, parameters = make()
    decay = OwnGroups(optimizer, parameters[:2])
    decay.begin()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    optimizer.step()
    decay.end()
    assert [float(parameter[0]) for parameter in parameters] == pytest.approx([1.0, 1.0, 0.95])


def test_nothing_changes_hands_where_nothing_decays():
    optimizer, parameters = make((0.0,))
    own = optimizer.param_groups
    decay = OwnGroups(optimizer, parameters[:1])
    decay.begin()
    assert optimizer.param_groups is own
    decay.end()


def test_schedulers_and_notes_of_the_optimizer():
    optimizer, parameters = make((0.1, 0.2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step] * 3)
    decay = OwnGroups(optimizer, [parameters[0], parameters[2]])
    for group in optimizer.param_groups:
        group["step"] = torch.tensor(0)
    for count in (1, 2):
        decay.begin()
        assert {group["lr"] for group in optimizer.param_groups} == {0.1 * 0.5 ** (count - 1)}
        for group in optimizer.param_groups:  # as schedule-free optimizers do, and those of optimi
            group["k"] = group.get("k", 0) + 1
            group["step"].add_(1)
        optimizer.step()
        decay.end()
        scheduler.step()
        assert [group["k"] for group in optimizer.param_groups] == [count] * 3
        assert [int(group["step"]) for group in optimizer.param_groups] == [count] * 3
    assert len(optimizer.param_groups) == 3


def test_an_error_in_a_step_leaves_nothing_behind():
    optimizer, parameters = make()
    own = optimizer.param_groups
    decay = OwnGroups(optimizer, parameters[:1])
    decay.begin()  # and no end
    decay.begin()
    assert len(optimizer.param_groups) == 3 and optimizer.param_groups[1] is own[1]  # places of groups hold
    assert len(optimizer.state_dict()["param_groups"]) == 2  # what is saved after an error in a step
    decay.end()
    assert optimizer.param_groups is own


def test_a_copy_works_on_its_own_parameters():
    optimizer, parameters = make()
    decay = OwnGroups(optimizer, parameters[:1])
    optimizer, parameters, decay = copy.deepcopy((optimizer, parameters, decay))
    for parameter in parameters:
        parameter.grad = torch.zeros(3)
    decay.begin()
    optimizer.step()
    decay.end()
    assert [float(parameter[0].detach()) for parameter in parameters] == pytest.approx([1.0, 0.99, 0.95])
