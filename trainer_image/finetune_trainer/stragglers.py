"""Ranks that are steadily slower than the others: in a step all wait for the slowest, so only forward passes tell.

A forward pass needs no other rank (under ZeRO-3 it does: there nobody is told from the others).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

WINDOW = 20
"""Steps that are looked at together."""
WINDOWS = 3
"""One after the other, in which the same rank is slow."""
FACTOR = 1.5
LEAST_SECONDS = 0.002
"""Of a step's forward passes: what takes less is noise."""


class Clock:
    """Seconds spent in `compute_loss`, by the GPU's own clock where there is one."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def timed(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if torch.cuda.is_available():
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                before.record()
                found = compute(*args, **options)
                after.record()
                self._events.append((before, after))
                return found
            started = time.perf_counter()
            found = compute(*args, **options)
            self._seconds += time.perf_counter() - started
            return found

        return call

    def take(self) -> float:
        """Since the last time."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(before.elapsed_time(after) for before, after in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Stragglers:
    """What all ranks conclude alike from what each of them took."""

    def __init__(self) -> None:
        self._slow: dict[int, int] = {}
        self.factors: dict[int, float] = {}
        """By rank that is steadily slow: how many times as long as the others it takes."""

    def window(self, seconds: Sequence[float]) -> None:
        """`seconds`: of each rank, for the same steps."""
        found = slow(seconds)
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in found}
        self.factors = {rank: found[rank] for rank, windows in self._slow.items() if windows >= WINDOWS}


def slow(seconds: Sequence[float]) -> dict[int, float]:
    """Ranks that took much longer than the median of the others, and how many times as long."""
    found = {}
    for rank, own in enumerate(seconds):
        others = [other for number, other in enumerate(seconds) if number != rank]
        usual = statistics.median(others) if others else own
        if own > FACTOR * usual and own > WINDOW * LEAST_SECONDS:
            found[rank] = own / max(1e-9, usual)
    return found
