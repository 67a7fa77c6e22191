"""PURE: the share of an hour that is training which lasts, with a fault every five minutes, in simulated time."""

from collections.abc import Callable

HOUR, FAULT = 3600.0, 300.0


def goodput(due: Callable[[float, float], bool], stall: float, stored: float, recovery: float, step: float) -> float:
    """`due(now, last)`: is a checkpoint due that much time after the last; all seconds.

    `stall`: a save stops training; `stored`: after that long it counts; `recovery`: from a fault to the next step.
    """
    now = last = lasting = learned = 0.0
    pending: list[tuple[float, float]] = []
    fault = FAULT
    while now < HOUR:
        if now >= fault:
            lasting = max([lasting, *(what for when, what in pending if when <= fault)])
            pending, learned = [], lasting
            now, last = fault + recovery, fault + recovery
            fault += FAULT
            continue
        now, learned = now + step, learned + step
        if due(now, last) and not any(when > now for when, _ in pending):
            pending.append((now + stored, learned))
            now, last = now + stall, now
    return learned / HOUR
