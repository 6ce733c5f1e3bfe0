import pytest

from hf_topkast import TopKastConfig
from hf_topkast.schedule import backward_density_at, exploration_end, refresh_due


def test_refresh_due_after_every_nth_step():
    assert [step for step in range(10) if refresh_due(step, 3)] == [3, 6, 9]
    assert [step for step in range(4) if refresh_due(step, 1)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("explore_until", "end"),
    [(None, None), (0, 0), (0.0, 0), (1, 200), (2, 2), (500, 500), (500.0, 500), (0.5, 100), (1.0, 200), (0.001, 0)],
)
def test_exploration_end(explore_until, end):
    assert exploration_end(explore_until, total_steps=200) == end


def test_a_fraction_needs_the_total():
    assert exploration_end(30, total_steps=None) == 30
    with pytest.raises(ValueError, match=r"explore_until=0\.5.*total_steps"):
        exploration_end(0.5, total_steps=None)


def test_backward_density_falls_to_density_when_exploration_ends():
    config = TopKastConfig(density=0.1, backward_density=0.3)
    assert [backward_density_at(step, config, 5) for step in (0, 4, 5, 9)] == [0.3, 0.3, 0.1, 0.1]
    assert backward_density_at(10**9, config, None) == 0.3
