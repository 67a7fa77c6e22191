"""Watches of what the operator makes: each object as it is listed, then every change, for as long as the process lives.

Nothing is kept but the version to go on from, and no more than one page or event is in memory at a time.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

from finetune_operator.errors import ApiError
from finetune_operator.essentials import Change, Object, Page

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 70.0
"""Without an event for so long, a bookmark included, a watch counts as dead and is opened anew where it stopped: an API
server sends bookmarks every minute and remembers what happened in the last 75 seconds."""
BACKOFFS = (1, 1, 2, 3, 5, 8, 13, *(20,) * 60)
"""Seconds between tries of what a watch asks for: 20 minutes in all. An API server that is away for a while is waited
for, with all that is known; after the last try the process ends, instead of being green without a watch."""
REOPEN_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Before a watch that ended is opened anew; longer each time that one ended without having told of anything."""
EXPIRED = 410


class Watched(Protocol):
    """What of a cluster a reflector needs; methods raise ApiError."""

    def list_pages(self, kind: str, namespace: str | None) -> AsyncIterator[Page]: ...

    def watch(self, kind: str, namespace: str | None, version: str, silence: float) -> AsyncGenerator[Change]: ...


class Reflector:
    """`run` it."""

    def __init__(
        self, cluster: Watched, kind: str, namespace: str | None, on_event: Callable[[str | None, Object], None]
    ) -> None:
        """`on_event(type, object)`: the type is None for what was there already. `namespace` None: all."""
        self._cluster, self._kind, self._namespace, self._on_event = cluster, kind, namespace, on_event
        self._failures = 0
        """Requests that failed since one went well."""
        self._idle = 0
        """Watches that told of nothing, one after the other."""

    async def run(self) -> None:
        """Raises ApiError when the API server has refused or been away for too long."""
        version: str | None = None
        while True:
            try:
                version = await self._list() if version is None else await self._watch(version)
                continue
            except ApiError as error:
                if error.status == EXPIRED:
                    # What happened since is forgotten there: only what is there now can be known.
                    version = None
                await self._back_off(error)

    async def _list(self) -> str:
        version = ""
        async for page in self._cluster.list_pages(self._kind, self._namespace):
            for found in page.items:
                self._tell(None, found)
            version = page.version
            # A page may be a tenth of a second's work: requests and reports go on meanwhile.
            await asyncio.sleep(0)
        self._failures = 0
        return version

    async def _watch(self, version: str) -> str:
        """The version to go on from. Raises ApiError."""
        told = False
        stream = self._cluster.watch(self._kind, self._namespace, version, SILENCE_SECONDS)
        began = time.monotonic()
        async with aclosing(stream) as changes:
            async for change in changes:
                if change.type == "ERROR":
                    raise _refused(self._kind, change.object)
                told, self._failures = True, 0
                version = change.object["metadata"].get("resourceVersion") or version
                if change.type != "BOOKMARK":
                    self._tell(change.type, change.object)
        quiet = not told and time.monotonic() - began < SILENCE_SECONDS / 2
        self._idle = self._idle + 1 if quiet else 0
        await asyncio.sleep(REOPEN_SECONDS[min(self._idle, len(REOPEN_SECONDS) - 1)])
        return version

    def _tell(self, kind: str | None, found: Object) -> None:
        try:
            self._on_event(kind, found)
        except Exception:
            # One object that cannot be dealt with must not end the watch of all others.
            meta = found.get("metadata") or {}
            extra = {"namespace": meta.get("namespace"), "job": meta.get("name")}
            logger.exception("an event of a %s cannot be dealt with", self._kind, extra=extra)

    async def _back_off(self, error: ApiError) -> None:
        if self._failures >= len(BACKOFFS):
            raise error
        pause = BACKOFFS[self._failures]
        self._failures += 1
        if error.status != EXPIRED:
            logger.warning("the watch of %s goes on in %g s: %s", self._kind, pause, error)
        await asyncio.sleep(pause)


def _refused(kind: str, status: Object) -> ApiError:
    code = status.get("code")
    reason, message = str(status.get("reason") or code), str(status.get("message") or "")[:1024]
    return ApiError(code if isinstance(code, int) else 500, reason, f"watch of {kind}: {message}")
