import numpy as np
import pytest

from hf_topkast import TopKastConfig
from hf_topkast.sets import Timetable


def due(total=40, **settings):
    config = TopKastConfig(density=0.2, **settings)
    return [step for step in range(1, total + 1) if Timetable.of(config, total).is_due(step)]


def test_refreshes_are_regular_and_stop_with_the_last_exchange():
    assert due(refresh_every=10) == [10, 20, 30, 40]
    assert due(refresh_every=10, method="set") == [10, 20, 30]  # 75% of training
    assert due(refresh_every=10, method="set", update_until=10.0) == [10]
    assert due(refresh_every=10, method="static") == []


def test_a_density_schedule_has_a_refresh_at_its_end_whatever_else_has_ended():
    assert due(refresh_every=10, initial_density=1.0, schedule_end=25) == [10, 20, 25, 30, 40]
    schedule = {"initial_density": 1.0, "schedule_begin": 0, "schedule_end": 25}
    assert due(refresh_every=10, method="set", update_until=5, **schedule) == [10, 20, 25]


def test_settings_that_may_change_count_at_once():
    config = TopKastConfig(density=0.2, refresh_every=10)
    timetable = Timetable.of(config, 40)
    config.refresh_every = 7
    assert timetable.next_refresh(8) == 14 and timetable.is_due(14) and not timetable.is_due(10)


def test_fractions_need_the_length_of_the_training():
    config = TopKastConfig(density=0.2, method="set", explore_until=None)
    with pytest.raises(ValueError, match="update_until=0.75 is a fraction of training.*total_steps"):
        Timetable.of(config, None)
    timetable = Timetable.of(TopKastConfig(density=0.2, explore_until=0.5), 40)
    assert timetable.exploration_end == 20
    assert [timetable.explores(step) for step in (0, 19, 20, 40)] == [True, True, False, False]


@pytest.mark.parametrize("total", [0, -1, 2.5, True, "40"])
def test_a_length_that_is_none_is_refused(total):
    with pytest.raises(ValueError, match=rf"total_steps={total!r} is not allowed.*at least 1, or None"):
        Timetable.of(TopKastConfig(density=0.2, method="rigl"), total)


def test_a_length_of_another_type():
    assert Timetable.of(TopKastConfig(density=0.2, method="rigl"), np.int64(40)).last_exchange == 30


def test_shares():
    timetable = Timetable.of(TopKastConfig(density=0.2, method="set"), 40)
    assert timetable.drop(0) == pytest.approx(0.3) and timetable.drop(15) == pytest.approx(0.15)
    assert timetable.drop(30) == pytest.approx(0, abs=1e-12) and timetable.drop(31) == 0
    schedule = TopKastConfig(density=0.2, initial_density=1.0, density_schedule="linear", schedule_end=20)
    assert [Timetable.of(schedule, 40).way_left(step) for step in (0, 5, 20, 40)] == [1.0, 0.75, 0.0, 0.0]
