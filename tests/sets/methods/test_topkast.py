import torch

from hf_topkast.method import LayerView
from hf_topkast.sets.methods.topkast import choose


def test_sets_hold_the_largest_weights():
    theta = torch.tensor([[0.1, -5.0, 2.0], [-0.3, 0.2, 4.0]])
    active, backward = choose(LayerView(theta, 2, 4))
    assert active.tolist() == [[False, True, False], [False, False, True]]
    assert backward.tolist() == [[False, True, True], [True, False, True]]


def test_ties_go_to_the_lower_flat_index_zeros_included():
    theta = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    active, backward = choose(LayerView(theta, 2, 4))
    assert active.tolist() == [[False, True, False], [False, True, False]]
    assert backward.tolist() == [[True, True, False], [False, True, True]]


def test_zeros_of_b_come_from_all_over_the_layer():
    theta = torch.zeros(4, 6)
    theta[1, 2], theta[3, 3] = 1.0, -2.0
    active, backward = choose(LayerView(theta, 1, 13, pruned=True))
    assert active.nonzero().tolist() == [[3, 3]]
    assert backward[1, 2] and backward[3, 3] and int(backward.sum()) == 13
    assert backward.sum(1).tolist() == [3, 4, 3, 3]


def test_a_that_needs_zeros_stays_inside_b():
    theta = torch.zeros(4, 6)
    theta[2] = 1.0
    active, backward = choose(LayerView(theta, 8, 10, pruned=True))
    assert int(active.sum()) == 8 and int(backward.sum()) == 10
    assert not (active & ~backward).any() and active[2].all()
