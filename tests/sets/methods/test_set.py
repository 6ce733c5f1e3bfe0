import pytest
import torch

from hf_topkast.method import LayerView
from hf_topkast.sets.methods import smet
from hf_topkast.sets.methods.set_ import choose


THETA = torch.arange(100.0).view(10, 10) * torch.tensor([1.0, -1.0]).repeat(5)
ACTIVE = THETA.abs() >= 60


def draws(size, drop, count=300):
    views = (
        LayerView(THETA, size, size, ACTIVE, ACTIVE, drop, generator=torch.Generator().manual_seed(seed))
        for seed in range(count)
    )
    return torch.stack([choose(view) for view in views])


def test_the_smallest_leave_and_others_come_at_random():
    chosen = draws(40, 0.3)
    assert (chosen.sum((1, 2)) == 40).all() and chosen[:, THETA.abs() >= 72].all()
    rest = chosen.float().mean(0)[THETA.abs() < 72]  # the 12 that were dropped just now have the same chance
    assert (rest - 12 / 72).abs().max() < 0.1 and rest.mean() == pytest.approx(12 / 72)


@pytest.mark.parametrize(("size", "stay"), [(20, 85), (60, 72)])
def test_sizes_that_change(size, stay):
    chosen = draws(size, 0.3 if size > 40 else 0.25, count=20)
    assert (chosen.sum((1, 2)) == size).all() and chosen[:, THETA.abs() >= stay].all()


def test_smet_chooses_as_set():
    assert smet.METHOD.choose is choose
