"""PURE. Token buckets: how much of something each key may take in a while."""

from collections import OrderedDict
from collections.abc import Hashable


class Buckets:
    """Token buckets by key: `burst` at once, then `rate` a second. A full bucket takes no memory, and of too many the
    least used go (which forgives their callers, and nobody else)."""

    def __init__(self, rate: float, burst: float, limit: int = 10_000) -> None:
        self._rate, self._burst, self._limit = rate, burst, limit
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, key: Hashable, now: float) -> float:
        """Takes one: 0.0, or the seconds until there is one to take."""
        tokens, then = self._buckets.pop(key, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self._rate
        self._buckets[key] = (tokens if wait else tokens - 1, now)
        while len(self._buckets) > self._limit:
            self._buckets.popitem(last=False)
        return wait

    def forget(self, key: Hashable) -> None:
        self._buckets.pop(key, None)

    def __len__(self) -> int:
        return len(self._buckets)
