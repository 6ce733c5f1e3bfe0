import pytest
import torch
from known_gradients import ACTIVE, THETA, Given

from hf_topkast.method import LayerView
from hf_topkast.sets.methods.gse import choose


def test_the_grown_come_from_the_sample_alone_and_stay():
    for seed in range(20):
        gradients, generator = Given(torch.arange(9.0).view(3, 3)), torch.Generator().manual_seed(seed)
        view = LayerView(THETA, 5, 5, ACTIVE, ACTIVE, 0.4, gradients=gradients, generator=generator)
        chosen = choose(view)
        ((count, sample),) = gradients.asked
        assert not (sample & ACTIVE).any() and int(sample.sum()) <= 4
        grown = chosen & ~ACTIVE
        assert count == min(2, int(sample.sum())) == int(grown.sum()) and not (grown & ~sample).any()
        assert int(chosen.sum()) == 5
        left = ACTIVE & ~chosen
        assert THETA.abs()[left].max() < THETA.abs()[chosen & ACTIVE].min()  # the grown, all zero, are exempt


def test_gradients_choose_within_the_sample():
    theta, active = torch.zeros(20, 20), torch.zeros(20, 20, dtype=torch.bool)
    active[:, :10] = True
    gradients = Given(torch.rand(20, 20, generator=torch.Generator().manual_seed(1)))
    chosen = choose(LayerView(theta, 200, 200, active, active, drop=0.2, gradients=gradients))
    ((count, sample),) = gradients.asked
    assert count == 40 and 100 < int(sample.sum()) < 150  # 200 draws with replacement from 200 places: 1 - 1/e
    grown = chosen & ~active
    assert gradients.scores[grown].min() > gradients.scores[sample & ~grown].max()


@pytest.mark.parametrize(("size", "drop"), [(5, 0.0), (7, 0.0), (3, 0.34), (9, 1.0), (8, 0.5)])
def test_sizes_that_change(size, drop):
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        gradients = Given(torch.arange(9.0).view(3, 3))
        view = LayerView(THETA, size, size, ACTIVE, ACTIVE, drop, gradients=gradients, generator=generator)
        assert int(choose(view).sum()) == size


def test_everything_active():
    everything = torch.ones(3, 3, dtype=torch.bool)
    view = LayerView(THETA, 9, 9, everything, everything, drop=0.5, gradients=Given(THETA.abs()))
    assert torch.equal(choose(view), everything)
