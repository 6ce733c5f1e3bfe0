import torch

from hf_topkast.method import LayerView
from hf_topkast.sets.methods.mest import choose


class Shown:
    def __init__(self, magnitudes):
        self.magnitudes = magnitudes

    def of_active(self):
        return self.magnitudes


def test_weight_and_a_hundredth_of_the_gradient_say_what_leaves():
    theta = torch.tensor([[0.10, -0.20, 0.30, 0.0, 0.0, 0.0]])
    active = theta != 0
    for gradient, leaves in (([0.0, 0.0, 0.0], 0), ([11.0, 0.0, 0.0], 1), ([21.0, 11.0, 0.0], 2)):
        shown = Shown(torch.tensor([[*gradient, 0.0, 0.0, 0.0]]))
        gone = torch.zeros(6, dtype=torch.bool)
        for seed in range(30):
            generator = torch.Generator().manual_seed(seed)
            view = LayerView(theta, 3, 3, active, active, 0.3, gradients=shown, generator=generator)
            chosen = choose(view)
            assert int(chosen.sum()) == 3
            gone |= (active & ~chosen).flatten()
        assert gone.nonzero().flatten().tolist() == [leaves]
