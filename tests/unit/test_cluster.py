"""The client's patience and its refusals, against a server that answers what the test says."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration

from finetune_operator.cluster import ApiError, KubeCluster


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
    with pytest.raises(ApiError, match=r"Unreadable: GET .*: the answer is no (list|JSON)") as failed:
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
