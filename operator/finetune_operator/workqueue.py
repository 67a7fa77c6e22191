"""Keys that want attention: each at most once, never two workers on the same key, failures with growing pauses.

Keys are served group by group in turn, and a group never has all workers: whoever has thousands of keys, or keeps a few
of them busy all the time, makes nobody else wait for longer than a worker takes for one.
`Schedule` is the whole logic, without a clock, a lock or a task; `WorkQueue` lets workers wait for it.
"""

import asyncio
import heapq
import math
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
_NOBODY = object()


class Schedule(Generic[K]):
    """Which key is next, and when. Times are seconds of any one clock."""

    def __init__(
        self,
        *,
        base: float = 1.0,
        longest: float = 300.0,
        jitter: Callable[[], float] = lambda: random.uniform(1.0, 1.25),
        group: Callable[[K], Hashable] = lambda key: None,
        most: float = math.inf,
    ) -> None:
        """`base`: the pause after a key's first failure, doubled by each further one up to `longest`. `group`: whose a
        key is. `most`: keys of one group that may be worked on at a time."""
        self._base, self._longest, self._jitter = base, longest, jitter
        self._group, self._most = group, most
        self._ready: dict[Hashable, deque[K]] = {}
        """By group, the group that was served longest ago first."""
        self._busy: Counter[Hashable] = Counter()
        """Keys that are worked on, by group."""
        self._waiting: set[K] = set()  # The members of `_ready`.
        self._working: set[K] = set()
        self._again: set[K] = set()  # Added while a worker had them.
        self._later: list[tuple[float, int, K]] = []
        self._due: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._order = 0

    def __len__(self) -> int:
        """Keys that wait or are worked on, without those that are only due later."""
        return len(self._waiting) + len(self._working)

    def add(self, key: K) -> None:
        """The key is to be looked at; often in a row is the same as once."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.setdefault(self._group(key), deque()).append(key)

    def add_at(self, key: K, due: float) -> None:
        """As `add`, at that time; of several times the earliest counts."""
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._order += 1
            heapq.heappush(self._later, (due, self._order, key))

    def take(self, now: float) -> K | None:
        """A key to work on until `done`; None where none may be."""
        while self._later and self._later[0][0] <= now:
            due, _, key = heapq.heappop(self._later)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)
        group = next((group for group in self._ready if self._busy[group] < self._most), _NOBODY)
        if group is _NOBODY:
            return None
        keys = self._ready.pop(group)
        key = keys.popleft()
        if keys:
            self._ready[group] = keys
        self._busy[group] += 1
        self._waiting.discard(key)
        self._working.add(key)
        # It is looked at now: a date that was set before has served.
        self._due.pop(key, None)
        return key

    def next_due(self) -> float | None:
        """When `take` may have more than now; None where only an `add` can help."""
        while self._later and self._due.get(self._later[0][2]) != self._later[0][0]:
            heapq.heappop(self._later)
        return self._later[0][0] if self._later else None

    def done(self, key: K, now: float, *, failed: bool = False, after: float | None = None) -> float | None:
        """The worker is through with the key. The pause in seconds until it comes back by itself, if it does."""
        self._working.discard(key)
        self._busy -= Counter([self._group(key)])
        pause = after
        if failed:
            count = self._failures[key] = self._failures.get(key, 0) + 1
            pause = min(self._base * 2.0 ** min(count - 1, 32), self._longest) * self._jitter()
        else:
            self._failures.pop(key, None)
        if pause is not None:
            self.add_at(key, now + pause)
        if key in self._again:
            self._again.discard(key)
            self.add(key)
        return pause


class WorkQueue(Generic[K]):
    """A `Schedule` on the event loop's clock."""

    def __init__(
        self,
        work: Callable[[K], Awaitable[float | None]],
        *,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[K, Exception], None] = lambda key, error: None,
        group: Callable[[K], Hashable] = lambda key: None,
        most: float = math.inf,
    ) -> None:
        """`work(key)` returns after how many seconds to call it again, or None; what it raises is a failure. `group`,
        `most`: see `Schedule`."""
        self._work = work
        self._on_failure = on_failure
        self._clock = clock
        self._schedule: Schedule[K] = Schedule(group=group, most=most)
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._schedule)

    def add(self, key: K) -> None:
        self._schedule.add(key)
        self._news.set()

    def add_after(self, key: K, seconds: float) -> None:
        self._schedule.add_at(key, self._clock() + seconds)
        self._news.set()

    async def run(self, workers: int) -> None:
        """Works until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(workers):
                tasks.create_task(self._worker(), name=f"worker {number}")

    async def _worker(self) -> None:
        while True:
            key = self._schedule.take(self._clock())
            if key is None:
                await self._wait()
                continue
            await self._handle(key)

    async def _wait(self) -> None:
        self._news.clear()
        due = self._schedule.next_due()
        timeout = None if due is None else max(0.0, due - self._clock())
        # Not `wait_for`: where the news comes as the worker is cancelled, that forgets the cancellation on Python 3.11.
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._news.wait()

    async def _handle(self, key: K) -> None:
        failed, after = True, None
        try:
            after = await self._work(key)
            failed = False
        except Exception as error:
            # Whatever it is, the other keys must go on, and this one is tried again.
            self._on_failure(key, error)
        finally:
            self._schedule.done(key, self._clock(), failed=failed, after=after)
            self._news.set()
