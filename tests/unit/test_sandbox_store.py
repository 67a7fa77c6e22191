"""Revisions, indexes, history and watchers of the store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from finetune_sandbox.errors import ApiError
from finetune_sandbox.selectors import parse_fields, parse_labels
from finetune_sandbox.store import Filter, Store, Table

FIELDS = ("metadata.name", "status.phase")


def made(name: str, namespace: str = "a", phase: str = "", **labels: str) -> dict[str, Any]:
    meta = {"name": name, "namespace": namespace, "uid": f"uid-{namespace}-{name}", "labels": labels}
    return {"metadata": meta, "status": {"phase": phase}}


@pytest.fixture
def store() -> Store:
    store = Store(history=4)
    store.define("pods", FIELDS)
    return store


def table(store: Store) -> Table:
    return store.tables["pods"]


def names(store: Store, want: Filter) -> list[str]:
    return [e.obj["metadata"]["name"] for e in table(store).select(want)]


def test_every_write_has_a_revision_of_its_own(store: Store) -> None:
    first, second = store.put("pods", made("x")), store.put("pods", made("x", phase="Running"))
    assert second.rev == first.rev + 1
    assert second.obj["metadata"]["resourceVersion"] == str(second.rev)
    assert first.obj["status"]["phase"] == "", "an older version stays as it was"
    assert store.remove("pods", second.copy()).rev == second.rev + 1
    assert store.get("pods", "a", "x") is None


def test_selection_uses_namespace_labels_and_fields(store: Store) -> None:
    for args in (("x", "a", "Running"), ("y", "a", ""), ("z", "b", "Running")):
        store.put("pods", made(*args, app="web"))
    assert names(store, Filter()) == ["x", "y", "z"]
    assert names(store, Filter("a")) == ["x", "y"]
    assert names(store, Filter("", parse_labels("app=web"), parse_fields("status.phase=Running", FIELDS))) == ["x", "z"]
    assert names(store, Filter("a", parse_labels("app=none"))) == []
    store.put("pods", made("x", "a", "Running", app="api"))
    assert names(store, Filter("", parse_labels("app=web"))) == ["y", "z"], "the index follows a changed label"


def test_owners_and_uids_are_indexed(store: Store) -> None:
    owner = store.put("pods", made("owner"))
    child = made("child")
    child["metadata"]["ownerReferences"] = [{"uid": "uid-a-owner"}]
    store.put("pods", child)
    assert store.dependents["uid-a-owner"] == {("pods", ("a", "child"))}
    store.put("pods", made("child"))
    assert "uid-a-owner" not in store.dependents
    assert store.by_uid("uid-a-owner") == ("pods", owner)
    store.remove("pods", owner.copy())
    assert store.by_uid("uid-a-owner") is None


async def collect(store: Store, cursor: int, count: int) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    async for batch in table(store).follow(cursor, lambda: 5.0):
        seen += [(e.type, e.entry.obj["metadata"]["name"]) for e in batch]
        if len(seen) >= count:
            break
    return seen


async def test_a_watcher_sees_the_past_from_its_revision_and_then_what_comes(store: Store) -> None:
    start = store.put("pods", made("x")).rev
    store.put("pods", made("y"))
    watching = asyncio.create_task(collect(store, table(store).cursor(start), 3))
    await asyncio.sleep(0)
    store.put("pods", made("y", phase="Running"))
    store.remove("pods", made("x"))
    assert await asyncio.wait_for(watching, 5) == [("ADDED", "y"), ("MODIFIED", "y"), ("DELETED", "x")]


async def test_an_idle_watcher_gets_empty_batches(store: Store) -> None:
    async for batch in table(store).follow(table(store).cursor(store.rev), lambda: 0.01):
        assert batch == []
        break


def test_a_forgotten_revision_is_gone(store: Store) -> None:
    start = store.put("pods", made("x")).rev
    for i in range(9):
        store.put("pods", made("x", phase=str(i)))
    with pytest.raises(ApiError) as caught:
        table(store).cursor(start)
    assert (caught.value.code, caught.value.reason) == (410, "Expired")
    assert table(store).cursor(store.rev) == 10


async def test_a_watcher_that_falls_behind_is_told_so(store: Store) -> None:
    cursor = table(store).cursor(store.rev)
    for i in range(9):
        store.put("pods", made("x", phase=str(i)))
    with pytest.raises(ApiError) as caught:
        await collect(store, cursor, 1)
    assert caught.value.code == 410


async def test_the_end_of_a_resource_ends_its_watches(store: Store) -> None:
    watching = asyncio.create_task(collect(store, table(store).cursor(store.rev), 9))
    await asyncio.sleep(0)
    store.put("pods", made("x"))
    store.drop("pods")
    assert await asyncio.wait_for(watching, 5) == [("ADDED", "x")]


def test_an_object_that_leaves_a_selection_is_deleted_for_its_watcher(store: Store) -> None:
    want = Filter("", parse_labels("app=web"))
    store.put("pods", made("x", app="web"))
    store.put("pods", made("x", app="web", more="yes"))
    store.put("pods", made("x", app="api"))
    store.put("pods", made("x", app="web"))
    store.remove("pods", made("x", app="web"))
    events = [want.seen_as(e) for e in table(store)._events]
    assert events == ["ADDED", "MODIFIED", "DELETED", "ADDED", "DELETED"]


def test_a_later_store_has_later_revisions() -> None:
    """So a client that outlived a store is told 410 and does not wait for revisions that were."""
    earlier = Store()
    earlier.define("pods", FIELDS)
    assert Store().rev >= earlier.rev > 1_700_000_000_000
