"""When a checkpoint is due."""

import math

from finetune_api.job import CheckpointInterval

MTBF_SECONDS = 24 * 3600.0
"""Assumed mean time between failures of one pod; a gang of n pods fails n times as often."""
LEAST_SECONDS = 30.0
FIRST_SECONDS = 60.0
"""Before a first checkpoint has shown what one costs."""


def auto_seconds(cost: float, workers: int, failures: int = 0) -> float:
    """The interval that loses the least (Young 1974): sqrt(2 · cost · MTBF); `cost`: seconds training stands still.

    Each of the `failures` that this gang has had shows that it lasts less long than was assumed.
    """
    return max(LEAST_SECONDS, math.sqrt(2 * cost * MTBF_SECONDS / workers / (1 + failures)))


class Pace:
    """`started` once, `due` at each step, `saved` after each checkpoint; times are monotonic seconds."""

    def __init__(self, interval: CheckpointInterval, workers: int, failures: int = 0) -> None:
        self._interval, self._workers, self._failures = interval, workers, failures
        self._step, self._time = 0, 0.0
        self._cost: float | None = None

    def started(self, step: int, now: float) -> None:
        self._step, self._time = step, now

    def saved(self, step: int, now: float, cost: float) -> None:
        """`cost`: seconds that training stood still for it."""
        self._step, self._time, self._cost = step, now, cost

    def due(self, step: int, now: float) -> bool:
        if self._interval.type == "Steps":
            assert self._interval.steps
            return step // self._interval.steps > self._step // self._interval.steps
        if self._interval.type == "Seconds":
            assert self._interval.seconds
            return now - self._time >= self._interval.seconds
        wait = FIRST_SECONDS if self._cost is None else auto_seconds(self._cost, self._workers, self._failures)
        return now - self._time >= wait
