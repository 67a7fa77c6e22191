"""Which ranks are steadily slow."""

import time

import pytest

from finetune_trainer.stragglers import WINDOWS, Clock, Stragglers, slow


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], []),
        ([1.0, 1.4, 1.0, 1.0], []),
        ([1.0, 1.0, 1.6, 1.0], [2]),
        ([1.0, 3.0], [1]),
        ([2.0, 2.0, 1.0, 1.0, 1.0, 1.0], [0, 1]),
        ([5.0], []),
        # Too little to tell.
        ([0.001, 0.003], []),
    ],
)
def test_slow_is_who_takes_much_longer_than_the_others(seconds: list[float], expected: list[int]) -> None:
    assert list(slow(seconds)) == expected


def test_one_slow_window_is_none_and_a_quick_one_begins_anew() -> None:
    stragglers = Stragglers()
    for number in range(1, WINDOWS + 2):
        stragglers.window([1.0, 2.0, 1.0])
        assert stragglers.factors == ({1: 2.0} if number >= WINDOWS else {})
    stragglers.window([1.0, 1.0, 1.0])
    stragglers.window([1.0, 2.0, 1.0])
    assert stragglers.factors == {}


def test_the_clock_counts_what_it_times_and_begins_anew() -> None:
    clock = Clock()
    assert clock.timed(lambda value, more: (time.sleep(0.02), value + more)[1])(1, more=2) == 3
    assert clock.take() >= 0.02
    assert clock.take() == 0.0
