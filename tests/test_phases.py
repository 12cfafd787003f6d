"""Seconds by phase, by a clock that only moves when it is told to."""

import pytest

from sparsify.phases import measured, phase, seconds_so_far


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_phase_inside_another_counts_for_itself_alone(clock):
    with measured(clock) as phases:
        clock.now += 1  # no phase
        with phase("statistics"):
            clock.now += 2
            with phase("forward"):
                clock.now += 4
            clock.now += 8
        with phase("forward"):
            clock.now += 16
            assert seconds_so_far() == {"statistics": 10, "forward": 20}
    assert phases.seconds() == {"statistics": 10, "forward": 20} and seconds_so_far() == {}


def test_all_that_is_inside_a_whole_phase_counts_for_it(clock):
    with measured(clock) as phases, phase("basis", whole=True):
        with phase("forward"), phase("statistics"):
            clock.now += 2
        clock.now += 1
    assert phases.seconds() == {"basis": 3}


def test_a_run_inside_another_counts_its_own_and_errors_end_phases(clock):
    with measured(clock) as outer:
        with measured(clock) as inner, pytest.raises(ValueError), phase("sweep"):
            clock.now += 2
            raise ValueError
        with phase("writing"):
            clock.now += 3
    assert inner.seconds() == {"sweep": 2} and outer.seconds() == {"writing": 3}


def test_nothing_is_counted_where_nobody_asks():
    with phase("forward"):
        assert seconds_so_far() == {}
