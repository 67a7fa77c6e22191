"""What kopf and the clients rely on in a watch. The same tests pass on the sandbox's API server and on a real one."""

from typing import Any

import pytest

from support.api import Api, Object, Watch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

OURS = {"labelSelector": "ours=yes"}


def path(namespace: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/configmaps" + (f"/{name}" if name else "")


async def make(api: Api, namespace: str, name: str, **labels: str) -> Object:
    metadata = {"name": name, "labels": {"ours": "yes", **labels}}
    body: Object = (await api.create(path(namespace), {"metadata": metadata, "data": {"k": "1"}})).must(201)
    return body


async def version(api: Api, namespace: str) -> str:
    return str((await api.get(path(namespace))).must(200)["metadata"]["resourceVersion"])


async def take(watch: Watch, count: int) -> list[Object]:
    return [await watch.next() for _ in range(count)]


def brief(events: list[Object]) -> list[tuple[str, str]]:
    return [(event["type"], event["object"]["metadata"]["name"]) for event in events]


async def test_a_watch_goes_on_from_a_version(api: Api, namespace: str) -> None:
    made = await make(api, namespace, "old")
    start = await version(api, namespace)
    changed = (await api.patch(path(namespace, "old"), {"data": {"k": "2"}})).must(200)
    async with api.watch(path(namespace), resourceVersion=start, **OURS) as watch:
        assert watch.status == 200
        await make(api, namespace, "new")
        await api.delete(path(namespace, "old"))
        events = await take(watch, 3)
    assert brief(events) == [("MODIFIED", "old"), ("ADDED", "new"), ("DELETED", "old")]
    assert events[0]["object"] == changed
    assert events[2]["object"]["metadata"]["uid"] == made["metadata"]["uid"]
    versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in events]
    assert versions == sorted(set(versions)), "each change, the deletion too, has a version of its own"
    assert versions[0] > int(start)

    # From any of them a second watch repeats what came after.
    async with api.watch(path(namespace), resourceVersion=versions[0], **OURS) as again:
        assert await take(again, 2) == events[1:]


@pytest.mark.parametrize("query", [{}, {"resourceVersion": "0"}])
async def test_without_a_version_what_exists_comes_first(api: Api, namespace: str, query: dict[str, str]) -> None:
    await make(api, namespace, "one")
    await make(api, namespace, "two")
    await api.get(path(namespace))  # a consistent read: what "any version" may be is no older than this
    async with api.watch(path(namespace), **query, **OURS) as watch:
        assert sorted(brief(await take(watch, 2))) == [("ADDED", "one"), ("ADDED", "two")]
        await make(api, namespace, "three")
        assert brief(await take(watch, 1)) == [("ADDED", "three")]


async def test_a_selector_turns_changes_into_arrivals_and_departures(api: Api, namespace: str) -> None:
    start = await version(api, namespace)
    async with api.watch(path(namespace), resourceVersion=start, labelSelector="color=red") as watch:
        await make(api, namespace, "a", color="blue")
        for color in ("red", "red", "blue"):
            patch = {"metadata": {"labels": {"color": color}, "annotations": {"count": str(id(color))}}}
            (await api.patch(path(namespace, "a"), patch)).must(200)
        await make(api, namespace, "b", color="red")
        events = await take(watch, 3)
    assert brief(events) == [("ADDED", "a"), ("DELETED", "a"), ("ADDED", "b")]


async def test_a_watch_of_one_name(api: Api, namespace: str) -> None:
    start = await version(api, namespace)
    async with api.watch(path(namespace), resourceVersion=start, fieldSelector="metadata.name=b") as watch:
        await make(api, namespace, "a")
        await make(api, namespace, "b")
        assert brief(await take(watch, 1)) == [("ADDED", "b")]


async def test_a_watch_across_namespaces(api: Api, namespace: str) -> None:
    start = await version(api, namespace)
    async with api.watch("/api/v1/configmaps", resourceVersion=start, labelSelector=f"in={namespace}") as watch:
        await make(api, namespace, "a", **{"in": namespace})
        assert brief(await take(watch, 1)) == [("ADDED", "a")]


async def test_a_watch_ends_when_asked_and_bookmarks_how_far_it_came(api: Api, namespace: str) -> None:
    start = await version(api, namespace)
    query: dict[str, Any] = {"resourceVersion": start, "allowWatchBookmarks": "true", "timeoutSeconds": 4, **OURS}
    async with api.watch(path(namespace), **query) as watch:
        (await api.create(path(namespace), {"metadata": {"name": "not-ours"}})).must(201)
        events = await watch.rest()
    assert {event["type"] for event in events} == {"BOOKMARK"}
    bookmark = events[-1]["object"]
    assert (bookmark["kind"], bookmark["apiVersion"]) == ("ConfigMap", "v1")
    assert int(bookmark["metadata"]["resourceVersion"]) > int(start), "it moves on past what it filters out"
    async with api.watch(path(namespace), resourceVersion=bookmark["metadata"]["resourceVersion"]) as watch:
        await make(api, namespace, "ours")
        assert brief(await take(watch, 1)) == [("ADDED", "ours")]


async def test_without_being_asked_no_bookmarks_come(api: Api, namespace: str) -> None:
    start = await version(api, namespace)
    async with api.watch(path(namespace), resourceVersion=start, timeoutSeconds=3) as watch:
        assert await watch.rest() == []


async def test_a_version_that_is_no_number_is_refused(api: Api, namespace: str) -> None:
    async with api.watch(path(namespace), resourceVersion="soon") as watch:
        assert watch.status >= 400
