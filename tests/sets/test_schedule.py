import pytest

from hf_topkast import TopKastConfig
from hf_topkast.sets.schedule import (
    SHAPES,
    backward_density_of,
    density_window,
    next_refresh,
    resolve_step,
    scheduled_density,
    way_left,
)


def test_refreshes_follow_every_nth_step_and_the_end_of_a_schedule():
    assert [next_refresh(step, 3) for step in range(7)] == [3, 3, 3, 6, 6, 6, 9]
    assert [next_refresh(step, 1) for step in range(3)] == [1, 2, 3]
    assert [next_refresh(step, 3, schedule_end=4) for step in range(7)] == [3, 3, 3, 4, 6, 6, 9]


@pytest.mark.parametrize(
    ("value", "step"),
    [(None, None), (0, 0), (0.0, 0), (1, 200), (2, 2), (500, 500), (500.0, 500), (0.5, 100), (1.0, 200), (0.001, 0)],
)
def test_a_field_is_a_step_or_a_fraction(value, step):
    assert resolve_step("explore_until", TopKastConfig(explore_until=value), total_steps=200) == step


def test_a_fraction_needs_the_total():
    assert resolve_step("explore_until", TopKastConfig(explore_until=30), total_steps=None) == 30
    with pytest.raises(ValueError, match=r"explore_until=0\.5.*total_steps"):
        resolve_step("explore_until", TopKastConfig(explore_until=0.5), total_steps=None)
    with pytest.raises(ValueError, match=r"schedule_end=0\.5.*total_steps"):
        density_window(TopKastConfig(initial_density=1.0), total_steps=None)


def test_window_of_the_density_schedule():
    assert density_window(TopKastConfig(), total_steps=None) is None
    assert density_window(TopKastConfig(initial_density=1.0), total_steps=40) == (0, 20)
    config = TopKastConfig(initial_density=1.0, schedule_begin=0.5, schedule_end=30)
    assert density_window(config, total_steps=40) == (20, 30)
    with pytest.raises(ValueError, match=r"schedule_begin=0\.5 is step 50 and schedule_end=30 is step 30 of 100"):
        density_window(config, total_steps=100)


def scheduled(shape, step, initial=1.0, final=0.2):
    config = TopKastConfig(density=0.2, initial_density=initial, density_schedule=shape)
    return scheduled_density(final, way_left(step, config, (10, 30)), config)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ends", [(1.0, 0.2), (0.05, 0.2), (1 / 3, 0.1)])
def test_density_goes_from_one_end_to_the_other(shape, ends):
    assert [scheduled(shape, step, *ends) for step in (0, 10, 30, 10**9)] == [ends[0], ends[0], ends[1], ends[1]]
    way = [scheduled(shape, step, *ends) for step in range(10, 31)]
    assert way == sorted(way, reverse=ends[0] > ends[1]) and len(set(way)) == 21


def test_shapes():
    assert scheduled("linear", 15) == pytest.approx(0.8)
    assert scheduled("cubic", 20) == pytest.approx(0.2 + 0.8 / 8)
    assert scheduled("cosine", 20) == pytest.approx(0.6)
    assert scheduled("cosine", 15) == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)


def test_without_a_schedule_nothing_moves():
    config = TopKastConfig(density=0.3)
    assert way_left(5, config, None) == 0
    assert [scheduled_density(0.3, left, config) for left in (0.0, 0.5, 1.0)] == [0.3, 0.3, 0.3]


def test_backward_density_keeps_its_ratio_until_exploration_ends():
    config = TopKastConfig(density=0.1, backward_density=0.3)
    assert backward_density_of(0.1, config, exploring=True) == 0.3
    assert backward_density_of(0.2, config, exploring=True) == pytest.approx(0.6)
    assert backward_density_of(0.5, config, exploring=True) == 1.0
    assert backward_density_of(0.5, config, exploring=False) == 0.5
