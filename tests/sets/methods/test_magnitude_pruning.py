import torch

from hf_topkast.method import LayerView
from hf_topkast.sets.methods.magnitude_pruning import choose


def test_what_is_pruned_stays_out_whatever_its_weight():
    theta = torch.tensor([[9.0, -1.0, 0.0], [8.0, 0.0, 0.5]])
    active = torch.tensor([[False, True, True], [False, True, True]])
    assert choose(LayerView(theta, 2, 2, active, active)).nonzero().tolist() == [[0, 1], [1, 2]]
    assert choose(LayerView(theta, 3, 3, active, active)).nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]
    assert choose(LayerView(theta, 2, 2)).nonzero().tolist() == [[0, 0], [1, 0]]
