import torch
from known_gradients import ACTIVE, THETA, Given

from hf_topkast.method import LayerView
from hf_topkast.sets.methods.rigl import choose


def test_the_smallest_leave_and_the_largest_gradients_come():
    gradients = Given(torch.tensor([[9.0, 50.0, 1.0], [50.0, 2.0, 3.0], [8.0, 50.0, 0.0]]))
    chosen = choose(LayerView(THETA, 5, 5, ACTIVE, ACTIVE, drop=0.4, gradients=gradients))
    assert chosen.tolist() == [[True, True, False], [True, False, False], [True, True, False]]
    (asked,) = gradients.asked
    assert asked[0] == 2 and torch.equal(asked[1], THETA.abs() < 1)  # the two that were dropped among them


def test_what_was_dropped_may_come_back():
    gradients = Given(torch.tensor([[0.0, 50.0, 9.0], [50.0, 2.0, 8.0], [0.0, 50.0, 0.0]]))
    assert torch.equal(choose(LayerView(THETA, 5, 5, ACTIVE, ACTIVE, drop=0.4, gradients=gradients)), ACTIVE)


def test_sizes_that_change():
    gradients = Given(torch.arange(9.0).view(3, 3))
    fewer = choose(LayerView(THETA, 3, 3, ACTIVE, ACTIVE, drop=0.34, gradients=gradients))
    assert int(fewer.sum()) == 3 and int((fewer & (THETA.abs() >= 3)).sum()) == 2 and fewer[2, 2]
    more = choose(LayerView(THETA, 7, 7, ACTIVE, ACTIVE, drop=0.0, gradients=gradients))
    assert int(more.sum()) == 7 and (more[ACTIVE]).all() and more[2, 2] and more[2, 0]


def test_the_first_sets_are_drawn_whatever_the_weights():
    draws = [choose(LayerView(THETA, 4, 4, generator=torch.Generator().manual_seed(seed))) for seed in range(400)]
    assert all(int(draw.sum()) == 4 for draw in draws)
    shares = torch.stack(draws).float().mean(0)
    assert (shares - 4 / 9).abs().max() < 0.1
