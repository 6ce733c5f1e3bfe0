import pytest
import torch

from hf_topkast.methods import METHODS, get_method
from hf_topkast.methods.topkast import choose


def test_sets_hold_the_largest_weights():
    theta = torch.tensor([[0.1, -5.0, 2.0], [-0.3, 0.2, 4.0]])
    active, backward = choose(theta, density=1 / 3, backward_density=2 / 3)
    assert active.tolist() == [[False, True, False], [False, False, True]]
    assert backward.tolist() == [[False, True, True], [True, False, True]]


def test_rounding_never_makes_b_smaller_than_a():
    theta = torch.arange(1.0, 4.0).view(1, 3)
    active, backward = choose(theta, density=0.01, backward_density=0.02)
    assert int(active.sum()) == int(backward.sum()) == 1


def test_unknown_method_is_refused():
    assert get_method("topkast") is METHODS["topkast"]
    with pytest.raises(ValueError, match="method='lottery'.*topkast"):
        get_method("lottery")
