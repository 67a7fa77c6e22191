"""FineTuneProfiles for many reconciles at once: few objects that every job reads."""

import asyncio
import time
from collections.abc import Callable, Sequence

from finetune_operator.cluster import Cluster, Object

FRESH_SECONDS = 1.0


class Profiles:
    """Reads of profiles, shared by all that ask within a second: a changed profile takes effect within that second.

    Everything else that a reconcile decides on is read by itself; profiles are the platform's, change rarely, and bind
    only what starts later. A read that fails is shared by nobody who asks afterwards.
    """

    def __init__(self, cluster: Cluster, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._clock = clock
        self._reads: dict[str, tuple[float, asyncio.Task[Sequence[Object]]]] = {}

    async def choice(self, wanted: str | None) -> Sequence[Object]:
        """What `select_profile` chooses from: the one that is named, if it exists, else all. Raises ApiError."""
        key, now = wanted or "", self._clock()
        at, read = self._reads.get(key, (now, None))
        if read is None or now - at >= FRESH_SECONDS or (read.done() and (read.cancelled() or read.exception())):
            self._reads = {k: entry for k, entry in self._reads.items() if now - entry[0] < FRESH_SECONDS}
            read = asyncio.create_task(self._read(wanted))
            self._reads[key] = now, read
        # Whoever is cancelled while it waits must not cancel the others' read.
        return await asyncio.shield(read)

    def forget(self) -> None:
        """Whoever asks now reads anew."""
        self._reads.clear()

    async def _read(self, wanted: str | None) -> Sequence[Object]:
        if not wanted:
            return await self._cluster.list_profiles()
        profile = await self._cluster.get("FineTuneProfile", None, wanted)
        return [profile] if profile else []
