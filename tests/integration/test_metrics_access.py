"""Metrics name the jobs of all tenants: a tenant's token does not read them, Prometheus's does."""

import asyncio
import secrets
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from finetune_operator.cluster import ApiError, KubeCluster
from finetune_operator.metrics import Metrics
from finetune_operator.scrape import (
    REMEMBERED,
    REMEMBERED_SECONDS,
    SHARED_SECONDS,
    STRANGERS_AT_ONCE,
    UNSHARED,
    Access,
    MetricsServer,
)
from finetune_operator.serving import Listening
from support import rights
from support.api import Api
from support.reporting import kube_cluster

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = pytest.mark.integration
READER = [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]


@asynccontextmanager
async def served(cluster: KubeCluster, folder: Path) -> AsyncIterator[tuple[str, ssl.SSLContext]]:
    listening = Listening(folder, ("127.0.0.1",), "127.0.0.1", 0, 64, connection_seconds=30.0)
    async with MetricsServer(Metrics(), access=Access(cluster), listening=listening) as server:
        yield f"https://127.0.0.1:{server.port}", ssl.create_default_context(cafile=folder / "ca.crt")


async def account(api: Api, namespace: str, name: str) -> str:
    """The token of a new ServiceAccount."""
    where = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    (await api.create(where, {"metadata": {"name": name}})).must(201)
    return await rights.token_of(api, namespace, name)


async def test_only_who_may_get_the_url_reads_them(
    api: Api, cluster: "Sandbox", namespace: str, tmp_path: Path
) -> None:
    tenant, prometheus = await account(api, namespace, "tuner"), await account(api, namespace, "prometheus")
    role = f"metrics-{secrets.token_hex(4)}"
    base = "/apis/rbac.authorization.k8s.io/v1"
    (await api.create(f"{base}/clusterroles", {"metadata": {"name": role}, "rules": READER})).must(201)
    binding = {
        "metadata": {"name": role},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "ServiceAccount", "name": "prometheus", "namespace": namespace}],
    }
    (await api.create(f"{base}/clusterrolebindings", binding)).must(201)
    headers = {
        "nobody": ({}, 401),
        "no token": ({"Authorization": "Basic dTpw"}, 401),
        "a made-up token": ({"Authorization": "Bearer nonsense"}, 401),
        "a tenant": ({"Authorization": f"Bearer {tenant}"}, 403),
        "Prometheus": ({"Authorization": f"Bearer {prometheus}"}, 200),
    }
    async with (
        kube_cluster(cluster.kubeconfig) as kube,
        served(kube, tmp_path) as (url, tls),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session,
    ):
        for who, (sent, code) in headers.items():
            for _ in range(2):
                async with session.get(f"{url}/metrics", headers=sent) as answer:
                    assert answer.status == code, who
                    assert ("finetune_operator_jobs" in await answer.text()) == (code == 200), who
    for kind in ("clusterrolebindings", "clusterroles"):
        await api.delete(f"{base}/{kind}/{role}")


class Reviews:
    """Says what it was told to, and counts how often it is asked."""

    def __init__(self, users: dict[str, bool]) -> None:
        self.users, self.asked, self.away = users, 0, False

    async def authenticate(self, token: str) -> dict[str, str] | None:
        self.asked += 1
        if self.away:
            raise ApiError(0, "Unreachable", "connection refused")
        return {"username": token} if token in self.users else None

    async def may_get(self, user: dict[str, str], url: str) -> bool:
        assert url == "/metrics"
        return self.users[user["username"]]


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


async def test_an_answer_holds_for_a_while_and_not_for_ever(clock: list[float]) -> None:
    reviews = Reviews({"good": True})
    access = Access(reviews, monotonic=lambda: clock[0])
    for _ in range(5):
        assert await access.check("Bearer good", "10.0.0.1") == 200
    assert reviews.asked == 1
    reviews.users["good"] = False
    clock[0] = REMEMBERED_SECONDS + 1
    assert await access.check("bearer good", "10.0.0.1") == 403


async def test_what_cannot_be_checked_is_refused_and_asked_again(clock: list[float]) -> None:
    reviews = Reviews({"good": True})
    access = Access(reviews, monotonic=lambda: clock[0])
    reviews.away = True
    assert await access.check("Bearer good", "10.0.0.1") == 503
    reviews.away = False
    assert await access.check("Bearer good", "10.0.0.1") == 200


async def test_a_token_that_no_json_can_hold_is_asked_about_nowhere(clock: list[float]) -> None:
    reviews = Reviews({})
    access = Access(reviews, monotonic=lambda: clock[0])
    assert await access.check("Bearer \udcff\udcff", "10.0.0.1") == 401
    assert reviews.asked == 0


async def test_strangers_cost_the_api_server_little_and_nobody_elses_scrape(clock: list[float]) -> None:
    reviews = Reviews({"good": True})
    access = Access(reviews, monotonic=lambda: clock[0])
    assert await access.check("Bearer good", "10.0.0.1") == 200
    codes = [await access.check(f"Bearer guess-{number}", "10.0.0.9") for number in range(1000)]
    assert codes.count(401) == STRANGERS_AT_ONCE
    assert codes.count(429) == 1000 - STRANGERS_AT_ONCE
    assert reviews.asked == 1 + STRANGERS_AT_ONCE
    assert await access.check("Bearer good", "10.0.0.1") == 200


async def test_few_tokens_are_remembered(clock: list[float]) -> None:
    reviews = Reviews({})
    access = Access(reviews, monotonic=lambda: clock[0])
    for number in range(REMEMBERED + 50):
        await access.check(f"Bearer guess-{number}", f"10.0.1.{number}")
    assert len(access._known) == REMEMBERED


async def test_readers_who_do_not_read_share_one_text() -> None:
    """Each would hold another one, of megabytes where there are thousands of jobs."""
    metrics, clock = Metrics(), [0.0]
    collections: list[float] = []

    class Large(Collector):
        def collect(self) -> Iterator[Metric]:
            collections.append(clock[0])
            yield Metric("large", "y" * 8_000_000, "gauge")

    metrics.registry.register(Large())
    collections.clear()
    async with MetricsServer(metrics, "127.0.0.1", monotonic=lambda: clock[0]) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        slow = []
        for _ in range(12):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readline()
            slow.append(writer)
        assert len(collections) == UNSHARED
        for _ in range(2):
            async with aiohttp.request("GET", url) as answer:
                assert len(await answer.read()) > 8_000_000
        assert len(collections) == UNSHARED
        clock[0] += SHARED_SECONDS
        async with aiohttp.request("GET", url) as answer:
            assert answer.status == 200
        assert len(collections) == UNSHARED + 1
        for writer in slow:
            writer.transport.abort()
