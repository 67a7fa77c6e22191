"""Objects, revisions and their history in memory; knows nothing of HTTP or of what an object means.

One event loop calls it and no method awaits, so each call is atomic. A stored object is never changed in place: every
version is a new dict, shared by readers, watchers and the history, and serialised at most once.
"""

from __future__ import annotations

import asyncio
import json
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator
from typing import Any

from finetune_sandbox.errors import ApiError, Obj, expired
from finetune_sandbox.selectors import Selector, field_values

Key = tuple[str, str]  # namespace ("" where there is none) and name

MAX_OBJECT = 1536 * 1024
"""Bytes of JSON: etcd's default for one request."""


def dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class Entry:
    """One version of one object."""

    __slots__ = ("_raw", "fields", "labels", "obj", "rev")

    def __init__(self, obj: Obj, rev: int, fields: dict[str, str]) -> None:
        self.obj, self.rev, self.fields = obj, rev, fields
        self.labels: dict[str, str] = obj["metadata"].get("labels") or {}
        self._raw: bytes | None = None

    @property
    def raw(self) -> bytes:
        if self._raw is None:
            self._raw = dump(self.obj)
        return self._raw

    @property
    def key(self) -> Key:
        meta = self.obj["metadata"]
        return meta.get("namespace", ""), meta["name"]

    def copy(self) -> Obj:
        """A private deep copy (through JSON, several times faster than copy.deepcopy)."""
        copied: Obj = json.loads(self.raw)
        return copied


class Event:
    """What happened at `entry.rev`: ADDED, MODIFIED or DELETED, with the version before."""

    __slots__ = ("_lines", "before", "entry", "type")

    def __init__(self, type_: str, entry: Entry, before: Entry | None) -> None:
        self.type, self.entry, self.before = type_, entry, before
        self._lines: dict[str, bytes] = {}

    def line(self, type_: str) -> bytes:
        """The watch frame, built once however many watch."""
        if type_ not in self._lines:
            self._lines[type_] = b'{"type":"%s","object":%s}\n' % (type_.encode(), self.entry.raw)
        return self._lines[type_]


class Filter:
    """What one list or watch wants to see."""

    def __init__(self, namespace: str = "", labels: Selector | None = None, fields: Selector | None = None) -> None:
        self.namespace, self.labels, self.fields = namespace, labels or Selector(), fields or Selector()

    def matches(self, entry: Entry) -> bool:
        if self.namespace and entry.key[0] != self.namespace:
            return False
        return self.labels.matches(entry.labels) and self.fields.matches(entry.fields)

    def seen_as(self, event: Event) -> str | None:
        """The type of an event for this watcher: an object that leaves the selection is DELETED for it."""
        now = event.type != "DELETED" and self.matches(event.entry)
        was = event.before is not None and self.matches(event.before)
        if now:
            return "MODIFIED" if was else "ADDED"
        return "DELETED" if was else None


class Table:
    """All objects of one resource, indexed by namespace, label and selectable field, and what happened to them."""

    def __init__(self, fields: Collection[str], history: int) -> None:
        self.fields = tuple(fields)
        self.spaces: dict[str, dict[str, Entry]] = {}
        self._index: dict[tuple[str, str, str], dict[Key, Entry]] = {}
        self._events: list[Event] = []
        self._base = 0  # how many events were forgotten before _events[0]
        self._floor = 0  # the revision of the newest forgotten event
        self._history = history
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    def get(self, namespace: str, name: str) -> Entry | None:
        return self.spaces.get(namespace, {}).get(name)

    def select(self, want: Filter) -> list[Entry]:
        """Matching objects in order of namespace and name."""
        return sorted((e for e in self._candidates(want) if want.matches(e)), key=lambda e: e.key)

    def _candidates(self, want: Filter) -> Iterable[Entry]:
        pins = [("l", k, v) for k, v in want.labels.pins()] + [("f", k, v) for k, v in want.fields.pins()]
        if pins:
            return min((self._index.get(p, {}) for p in pins), key=len).values()
        if want.namespace:
            return self.spaces.get(want.namespace, {}).values()
        return (e for space in self.spaces.values() for e in space.values())

    def _pins(self, entry: Entry) -> Iterator[tuple[str, str, str]]:
        yield from (("l", k, v) for k, v in entry.labels.items())
        yield from (("f", k, v) for k, v in entry.fields.items())

    def record(self, event: Event) -> None:
        key = event.entry.key
        space = self.spaces.setdefault(key[0], {})
        for pin in self._pins(event.before) if event.before else ():
            self._index[pin].pop(key, None)
            if not self._index[pin]:
                del self._index[pin]
        if event.type == "DELETED":
            del space[key[1]]
        else:
            space[key[1]] = event.entry
            for pin in self._pins(event.entry):
                self._index.setdefault(pin, {})[key] = event.entry
        self._events.append(event)
        if len(self._events) > 2 * self._history:
            self._floor = self._events[self._history - 1].entry.rev
            del self._events[: self._history]
            self._base += self._history
        for watcher in self._watchers:
            watcher.set()

    def forget_history(self, rev: int) -> None:
        """Drops every event up to now, as a compaction does: a watch from an older revision gets 410."""
        self._base += len(self._events)
        self._events.clear()
        self._floor = rev

    def close(self) -> None:
        self._closed = True
        for watcher in self._watchers:
            watcher.set()

    def cursor(self, rev: int) -> int:
        """The position of the first event after `rev`. Raises ApiError 410 where that is forgotten."""
        if rev < self._floor:
            raise expired(f"too old resource version: {rev} ({self._floor})")
        return self._base + bisect_right(self._events, rev, key=lambda e: e.entry.rev)

    async def follow(self, cursor: int, idle: Callable[[], float]) -> AsyncGenerator[list[Event], None]:
        """Batches of events from `cursor` on; an empty batch after `idle()` seconds without one. A reader that falls
        behind the history gets ApiError 410, as from a real server."""
        wake = asyncio.Event()
        self._watchers.add(wake)
        try:
            while True:
                if cursor < self._base:
                    raise expired("too old resource version: the watcher fell behind the history")
                batch = self._events[cursor - self._base :]
                cursor += len(batch)
                if not batch:
                    if self._closed:
                        return
                    wake.clear()
                    try:
                        await asyncio.wait_for(wake.wait(), idle())
                    except TimeoutError:
                        yield []
                    continue
                yield batch
        finally:
            self._watchers.discard(wake)


class Store:
    """Every object, by resource (`jobs.batch`), by UID and by owner UID, under one revision counter."""

    def __init__(self, history: int = 10_000) -> None:
        # Clients of an earlier life must get 410, not silence: revisions go on from the clock.
        self.rev = self.first_rev = time.time_ns() // 1_000_000
        self.tables: dict[str, Table] = {}
        self.uids: dict[str, tuple[str, Key]] = {}
        self.dependents: dict[str, set[tuple[str, Key]]] = {}
        self._history = history

    def define(self, resource: str, fields: Collection[str]) -> Table:
        table = self.tables[resource] = Table(fields, self._history)
        table.forget_history(self.rev)
        return table

    def drop(self, resource: str) -> None:
        """Ends a resource and the watches of it."""
        self.tables.pop(resource).close()

    def get(self, resource: str, namespace: str, name: str) -> Entry | None:
        return self.tables[resource].get(namespace, name)

    def by_uid(self, uid: str) -> tuple[str, Entry] | None:
        place = self.uids.get(uid)
        entry = self.get(place[0], *place[1]) if place and place[0] in self.tables else None
        return (place[0], entry) if place and entry else None

    def put(self, resource: str, obj: Obj) -> Entry:
        """Stores a new version (the caller gives `obj` away) and stamps its resourceVersion. Raises ApiError 500 where
        it is larger than what etcd takes."""
        table = self.tables[resource]
        entry = self._version(table, obj)
        if len(entry.raw) > MAX_OBJECT:
            raise ApiError(500, "InternalError", "etcdserver: request is too large")
        before = table.get(*entry.key)
        self._own(resource, before, entry)
        table.record(Event("MODIFIED" if before else "ADDED", entry, before))
        return entry

    def remove(self, resource: str, obj: Obj) -> Entry:
        """Removes an object; `obj` is its last version as watchers shall see it."""
        table = self.tables[resource]
        entry = self._version(table, obj)
        before = table.get(*entry.key)
        self._own(resource, before, None)
        table.record(Event("DELETED", entry, before))
        return entry

    def _version(self, table: Table, obj: Obj) -> Entry:
        self.rev += 1
        obj["metadata"]["resourceVersion"] = str(self.rev)
        return Entry(obj, self.rev, field_values(obj, table.fields))

    def _own(self, resource: str, before: Entry | None, after: Entry | None) -> None:
        if before:
            place = (resource, before.key)
            self.uids.pop(before.obj["metadata"]["uid"], None)
            for ref in before.obj["metadata"].get("ownerReferences") or ():
                self.dependents[ref["uid"]].discard(place)
                if not self.dependents[ref["uid"]]:
                    del self.dependents[ref["uid"]]
        if after:
            place = (resource, after.key)
            self.uids[after.obj["metadata"]["uid"]] = place
            for ref in after.obj["metadata"].get("ownerReferences") or ():
                self.dependents.setdefault(ref["uid"], set()).add(place)
