"""The client's patience and its refusals, against a server that answers what the test says."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration

from finetune_operator import cluster, connection
from finetune_operator.cluster import ApiError, KubeCluster
from finetune_operator.essentials import Page, page_reader


class Server:
    """Answers with the next of `answers`, the last one for ever: (status, headers, body)."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], Any]] = [(200, {}, {"items": []})]
        self.requests: list[tuple[str, str, Any]] = []

    async def answer(self, request: web.BaseRequest) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.requests.append((request.method, request.path_qs, body))
        status, headers, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, bytes):
            return web.Response(body=answer, status=status, headers=headers)
        return web.json_response(answer, status=status, headers=headers)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, KubeCluster, list[float], list[Any]]]:
    served, pauses, calls = Server(), [], []
    runner = web.ServerRunner(web.Server(served.answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    configuration = Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")
    client = KubeCluster(configuration, attempts=4, sleep=sleep, on_call=lambda *call: calls.append(call[:3]))
    yield served, client, pauses, calls
    await client.close()
    await runner.cleanup()


Served = Callable[[Server], Awaitable[KubeCluster]]


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """A client of a server of the test's own."""
    async with AsyncExitStack() as stack:

        async def start(server: Server) -> KubeCluster:
            runner = web.ServerRunner(web.Server(server.answer))
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            client = KubeCluster(Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}"), attempts=1)
            stack.push_async_callback(client.close)
            return client

        yield start


Fixture = tuple[Server, KubeCluster, list[float], list[Any]]


async def test_it_waits_as_long_as_it_is_told_to(server: Fixture) -> None:
    served, client, pauses, calls = server
    served.answers = [(429, {"Retry-After": "7"}, {}), (503, {}, {}), (200, {}, {"items": [{"a": 1}]})]
    assert await client.list_profiles() == [{"a": 1}]
    assert 7 <= pauses[0] <= 8.75
    assert 1 <= pauses[1] <= 1.25
    assert [call[2] for call in calls] == [429, 503, 200]
    assert {call[:2] for call in calls} == {("GET", "finetuneprofiles")}


async def test_its_patience_ends(server: Fixture) -> None:
    served, client, pauses, _ = server
    served.answers = [(429, {}, {"reason": "TooManyRequests", "message": "slow down"})]
    with pytest.raises(ApiError, match=r"429 TooManyRequests: GET .*: slow down"):
        await client.list_profiles()
    assert (len(served.requests), len(pauses)) == (4, 3)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 500])
async def test_a_list_that_failed_is_not_empty(server: Fixture, status: int) -> None:
    served, client, pauses, _ = server
    served.answers = [(status, {}, {"reason": "Whatever"})]
    with pytest.raises(ApiError):
        await client.list_children("Job", "ns", "j")
    assert pauses == []


@pytest.mark.parametrize("answer", [b"\x1f\x8b\x08", b"<html>", b"", b"[" * 200_000, {}, [], {"items": None}, "x", 7])
async def test_what_is_no_list_is_an_error_of_the_servers(server: Fixture, answer: Any) -> None:
    served, client, _, _ = server
    served.answers = [(200, {}, answer)]
    with pytest.raises(ApiError, match=r"Unreadable: GET .*: the answer cannot be read") as failed:
        await client.list_profiles()
    assert failed.value.status == 0, "it is about everybody, and not about an object"


async def test_not_found_is_only_what_the_server_calls_so(server: Fixture) -> None:
    served, client, _, _ = server
    served.answers = [(404, {}, {"reason": "NotFound"})]
    assert await client.get("Job", "ns", "j") is None
    served.answers = [(404, {}, "page not found")]
    with pytest.raises(ApiError):
        await client.get("Job", "ns", "j")


async def test_nobody_at_home() -> None:
    client = KubeCluster(Configuration(host="http://127.0.0.1:1"))
    with pytest.raises(ApiError, match="Unreachable"):
        await client.list_profiles()
    await client.close()


@pytest.mark.parametrize(
    ("status", "user"),
    [
        ({"authenticated": False}, None),
        ({"authenticated": True, "user": {"username": "u"}}, None),
        ({"authenticated": True, "audiences": ["other"], "user": {"username": "u"}}, None),
        ({"authenticated": True, "audiences": ["a"], "user": {"username": "u"}}, ("u", None, None)),
        (
            {
                "authenticated": True,
                "audiences": ["a"],
                "user": {
                    "username": "u",
                    "extra": {
                        "authentication.kubernetes.io/pod-name": ["p"],
                        "authentication.kubernetes.io/pod-uid": ["1"],
                    },
                },
            },
            ("u", "p", "1"),
        ),
    ],
)
async def test_a_token_counts_only_for_its_audience(server: Fixture, status: Any, user: Any) -> None:
    served, client, _, _ = server
    served.answers = [(201, {}, {"status": status})]
    assert await client.token_review("t", ("a",)) == user


class Bytes(Server):
    """Answers with these very bytes."""

    def __init__(self, *answers: bytes) -> None:
        super().__init__()
        self.bodies = list(answers)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.requests.append((request.method, request.path_qs, None))
        body = self.bodies.pop(0) if len(self.bodies) > 1 else self.bodies[0]
        return web.Response(body=body, content_type="application/json")


def deep(depth: int) -> bytes:
    return b'{"items":[],"metadata":{"managedFields":' + b"[" * depth + b"]" * depth + b"}}"


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>", b"[]", b'"text"', b"null", b"7", b"{", b"{}}", b"\xff\xfe", b'{"items":[]', b"[" * 100_000),
        *(b'{"items":null,"metadata":{}}', b'{"items":{},"metadata":{}}', b'{"items":["a"]}', b'{"metadata":{}}'),
        *(b'{"items":[{}]}', b'{"items":[{"metadata":{}}]}', b'{"items":[null]}', b'{"items":[],"metadata":{"a":NaN}}'),
        *(b'{"items":[],"metadata":{"continue":7}}', deep(50_000)),
    ],
)
async def test_an_answer_of_another_form_is_an_error(served: Served, body: bytes) -> None:
    """Nothing is taken for an empty list, and nothing but ApiError is raised."""
    client = await served(Bytes(body))
    for call in (
        lambda: client.list_children("Job", "n", "j"),
        lambda: client.list_children("Pod", "n", "j"),
        lambda: client.get("Job", "n", "j"),
        lambda: client.get_job("n", "j"),
        lambda: client.patch_status("n", "j", "u", {}),
    ):
        with pytest.raises(ApiError) as caught:
            await call()
        assert len(str(caught.value)) < 1000


async def test_an_object_that_is_nested_as_deep_as_a_server_takes_hides_no_other(served: Served) -> None:
    client = await served(Bytes(deep(9_000)))
    assert await client.list_children("Job", "n", "j") == []


async def test_an_answer_without_end_is_not_read_to_its_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LARGEST", 100_000)
    client = await served(Bytes(b" " * 200_000 + b"{}"))
    with pytest.raises(ApiError, match="TooLarge"):
        await client.ask("GET", "/api/v1/namespaces/n/pods/p", read=dict, most=connection.LARGEST)


class Pages(Server):
    """A list of Jobs of these sizes, in pages as they are asked for."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.sent: list[int] = []
        """Jobs in each answer."""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        start, limit = int(request.query.get("continue") or 0), int(request.query["limit"])
        some = self.sizes[start : start + limit]
        self.sent.append(len(some))
        items = [
            {"metadata": {"name": f"j{start + n}", "uid": "u"}, "spec": {"x": "x" * size}}
            for n, size in enumerate(some)
        ]
        rest = start + limit < len(self.sizes)
        return web.json_response({"metadata": {"continue": str(start + limit) if rest else ""}, "items": items})


@pytest.mark.parametrize(
    "sizes", [[10] * 1200, [1_200_000] * 9, [9_000_000, 10, 9_000_000], [10] * 300 + [3_000_000] * 3]
)
async def test_of_large_objects_fewer_are_asked_for(served: Served, sizes: list[int]) -> None:
    pages = Pages(*sizes)
    client = await served(pages)
    found = await client.list_children("Job", "n", "j")
    assert [item["metadata"]["name"] for item in found] == [f"j{n}" for n in range(len(sizes))]
    assert all(set(item) <= {"metadata", "spec"} and not item.get("spec") for item in found)
    # Few requests for small ones, and not many that are thrown away for large ones.
    assert len(pages.sent) <= 20 + 2 * sum(size > 100_000 for size in sizes)


async def test_no_part_of_a_list_is_larger_than_allowed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(cluster, "page_reader", lambda kind: noting(page_reader(kind), sizes))
    client = await served(Pages(*[1_200_000] * 30))
    await client.list_children("Job", "n", "j")
    assert max(sizes) <= cluster.PAGE_BYTES


def noting(read: Callable[[Any], Page], sizes: list[int]) -> Callable[[Any], Page]:
    def noted(data: Any) -> Page:
        sizes.append(len(data))
        return read(data)

    return noted


async def test_one_job_has_no_more_children_than_can_be_held(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "MOST_CHILDREN", 50)
    client = await served(Pages(*[1] * 60))
    with pytest.raises(ApiError, match=r"namespace n has more than 50 objects of kind Job .*; delete those"):
        await client.list_children("Job", "n", "j")


async def test_lines_are_whole_however_they_arrive() -> None:
    text = b'{"a":1}\n\n{"b":"' + b"x" * 300 + b'"}\n{"cut'

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    for size in (1, 7, 64, len(text)):
        assert [line async for line in connection.lines(pieces(size))] == text.split(b"\n")[:3:2]


async def test_a_line_without_end_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LARGEST", 100)

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"one\n", *[b"x" * 60] * 5, b"end\ntwo\n"):
            yield piece

    assert [line async for line in connection.lines(pieces())] == [b"one", b"two"]
