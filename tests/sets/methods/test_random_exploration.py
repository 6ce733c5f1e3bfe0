import torch

from hf_topkast.method import LayerView
from hf_topkast.sets.methods import random_exploration, static


THETA = torch.arange(1.0, 101.0).view(10, 10)


def draws(choose, count=300):
    pairs = [choose(LayerView(THETA, 20, 60, generator=torch.Generator().manual_seed(seed))) for seed in range(count)]
    active, backward = map(torch.stack, zip(*pairs))
    assert (active.sum((1, 2)) == 20).all() and (backward.sum((1, 2)) == 60).all() and not (active & ~backward).any()
    return active.float().mean(0), backward.float().mean(0)


def test_exploration_is_drawn_and_the_active_set_is_not():
    active, backward = draws(random_exploration.choose)
    assert torch.equal(active, (THETA > 80).float())
    assert (backward[THETA <= 80] - 0.5).abs().max() < 0.12


def test_static_sets_drawn():
    active, backward = draws(static.choose_random)
    assert (active - 0.2).abs().max() < 0.12 and (backward - 0.6).abs().max() < 0.12
