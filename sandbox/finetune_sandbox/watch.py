"""The watch stream: initial events, changes, bookmarks, and 410 for who comes too late."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping

from aiohttp import web

from finetune_sandbox import table
from finetune_sandbox.errors import ApiError, Obj, bad_request, not_allowed
from finetune_sandbox.errors import invalid as invalid_error
from finetune_sandbox.registry import Registry
from finetune_sandbox.requests import Route, filter_of, revision, wants_table
from finetune_sandbox.resources import Resource
from finetune_sandbox.store import Entry, Event, Filter, Table, dump

BOOKMARK_SECONDS = 60.0
DEFAULT_TIMEOUT_SECONDS = 1800.0
INITIAL_EVENTS_END = {"k8s.io/initial-events-end": "true"}


class _Framer:
    """Turns what a watcher sees into lines, objects or Tables."""

    def __init__(self, resource: Resource, include: str) -> None:
        self.resource, self.include, self._head = resource, include, True

    def event(self, type_: str, event: Event) -> bytes:
        return self._table(type_, event.entry) if self.include else event.line(type_)

    def initial(self, entry: Entry) -> bytes:
        if self.include:
            return self._table("ADDED", entry)
        return b'{"type":"ADDED","object":%s}\n' % entry.raw

    def _table(self, type_: str, entry: Entry) -> bytes:
        version = {"resourceVersion": str(entry.rev)}
        rendered = table.render(self.resource, [entry], version, self.include, head=self._head)
        self._head = False
        return dump({"type": type_, "object": rendered}) + b"\n"

    def bookmark(self, rev: int, annotations: Mapping[str, str] | None = None) -> bytes:
        data: Obj = {"resourceVersion": str(rev), "creationTimestamp": None}
        if annotations:
            data["annotations"] = dict(annotations)
        obj: Obj = {"kind": self.resource.kind, "apiVersion": self.resource.api_version, "metadata": data}
        if self.include:
            obj = {
                "kind": "Table",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": data,
                "rows": [],
                "columnDefinitions": [],
            }
        return dump({"type": "BOOKMARK", "object": obj}) + b"\n"


async def serve(
    request: web.BaseRequest, registry: Registry, resource: Resource, route: Route, query: Mapping[str, str]
) -> web.StreamResponse:
    """Answers a watch until its timeout, the client's leaving or an error event."""
    want = filter_of(resource, route, query)
    if route.name:
        raise bad_request("watch a collection with fieldSelector=metadata.name=<name>")
    framer = _Framer(resource, wants_table(request.headers.get("Accept", ""), query))
    timeout = query.get("timeoutSeconds") or "0"
    if not timeout.isdigit():
        raise bad_request(f"timeoutSeconds: expected a number, found {timeout!r}")
    deadline = time.monotonic() + (float(timeout) or DEFAULT_TIMEOUT_SECONDS)
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Cache-Control": "no-cache, private"})
    start, initial = _start(registry, query)
    await response.prepare(request)
    lines = _lines(registry, resource, want, framer, query, deadline, start, initial)
    try:
        async for chunk in lines:
            await response.write(chunk)
        await response.write_eof()
    except ConnectionError:
        pass  # the client has left, which is how watches end
    finally:
        await lines.aclose()
    return response


async def _lines(
    registry: Registry,
    resource: Resource,
    want: Filter,
    framer: _Framer,
    query: Mapping[str, str],
    deadline: float,
    start: int,
    initial: bool,
) -> AsyncGenerator[bytes, None]:
    source = registry.store.tables[resource.key]
    bookmarks = query.get("allowWatchBookmarks", "") in ("true", "1")
    try:
        cursor = source.cursor(start)
    except ApiError as error:
        yield _error(error)
        return
    if initial:
        if entries := source.select(want):
            yield b"".join(framer.initial(e) for e in entries)
        if query.get("sendInitialEvents") == "true" and bookmarks:
            yield framer.bookmark(start, INITIAL_EVENTS_END)
    async for chunk in _changes(registry, source, want, framer, cursor, deadline, bookmarks):
        yield chunk


async def _changes(
    registry: Registry, source: Table, want: Filter, framer: _Framer, cursor: int, deadline: float, bookmarks: bool
) -> AsyncGenerator[bytes, None]:
    """What happens from `cursor` on; ends at the deadline with a last bookmark."""
    follower = source.follow(cursor, lambda: min(BOOKMARK_SECONDS, deadline - time.monotonic()))
    try:
        async for batch in follower:
            seen = ((want.seen_as(e), e) for e in batch)
            if frames := b"".join(framer.event(t, e) for t, e in seen if t):
                yield frames
            if not batch and bookmarks:
                yield framer.bookmark(registry.store.rev)
            if time.monotonic() >= deadline:
                return
    except ApiError as error:
        yield _error(error)
    finally:
        await follower.aclose()


def _start(registry: Registry, query: Mapping[str, str]) -> tuple[int, bool]:
    """The revision to begin after, and whether what is there now comes first."""
    rev = revision(query.get("resourceVersion") or "0")
    send, match = query.get("sendInitialEvents"), query.get("resourceVersionMatch")
    if send == "true":
        if match != "NotOlderThan":
            why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
            raise invalid_error("ListOptions", "meta.k8s.io", "", [not_allowed("resourceVersionMatch", why)])
        return registry.store.rev, True
    if match:
        why = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"
        raise invalid_error("ListOptions", "meta.k8s.io", "", [not_allowed("resourceVersionMatch", why)])
    if rev == 0:
        return registry.store.rev, send != "false"
    return rev, False


def _error(error: ApiError) -> bytes:
    return dump({"type": "ERROR", "object": error.status()}) + b"\n"
