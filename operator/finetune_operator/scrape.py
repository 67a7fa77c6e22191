"""`GET /metrics`, which names the jobs of all tenants: for whom the API server lets read it, or for everybody."""

import asyncio
import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from aiohttp import web
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from finetune_operator.buckets import Buckets
from finetune_operator.cluster import ApiError
from finetune_operator.metrics import Metrics
from finetune_operator.serving import HttpServer, Listening, bearer

logger = logging.getLogger(__name__)
PATH = "/metrics"
MAX_CONNECTIONS, CONNECTION_SECONDS = 64, 30.0
REMEMBERED_SECONDS = 60.0
"""How long an answer of the API server holds: Prometheus asks every 30 seconds, or more often."""
REMEMBERED = 256
"""Tokens."""
STRANGERS_PER_SECOND, STRANGERS_AT_ONCE = 2.0, 20.0
"""Unknown tokens of one address: each costs two requests to the API server."""


class AccessCluster(Protocol):
    """What is asked about a scraper; raises ApiError."""

    async def authenticate(self, token: str) -> Mapping[str, Any] | None:
        """The token's user (authentication.k8s.io/v1 UserInfo), or None."""

    async def may_get(self, user: Mapping[str, Any], url: str) -> bool:
        """Whether a user may `get` this nonResourceURL."""


class Access:
    """Who may read the metrics: as with the API server's own, whoever may `get` the nonResourceURL /metrics."""

    def __init__(self, cluster: AccessCluster, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """`monotonic`: seconds."""
        self._cluster, self._monotonic = cluster, monotonic
        self._known: OrderedDict[bytes, tuple[int, float]] = OrderedDict()
        self._strangers = Buckets(STRANGERS_PER_SECOND, STRANGERS_AT_ONCE)

    async def check(self, authorization: str, remote: str | None) -> int:
        """200, or the HTTP code of the refusal."""
        if (token := bearer(authorization)) is None:
            return 401
        digest, now = hashlib.sha256(token.encode()).digest(), self._monotonic()
        code, until = self._known.get(digest, (0, 0.0))
        if now < until:
            return code
        if self._strangers.take(remote, now):
            return 429
        try:
            user = await self._cluster.authenticate(token)
            code = 401 if user is None else 200 if await self._cluster.may_get(user, PATH) else 403
        except ApiError as error:
            logger.warning("who scrapes cannot be checked: %s", error)
            return 503
        self._known[digest] = code, now + REMEMBERED_SECONDS
        self._known.move_to_end(digest)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return code


MEANINGS = {
    401: "a bearer token of this cluster is required",
    403: f"the token's user may not get the nonResourceURL {PATH}",
    429: "too many unknown tokens; try again later",
    503: "the API server does not answer; try again later",
}


CHUNK = 64 * 1024
"""Bytes that are written before the peer must have read most of them."""
SHARED_SECONDS = 10.0
"""How old a text may be that is sent to several readers."""
UNSHARED = 2
"""Texts that are sent at a time; with more readers they share one, so that slow ones cannot hold memory without end."""


@dataclass
class _Text:
    """The metrics as one content type has them, while they are sent."""

    body: bytes = b""
    made: float = -math.inf
    readers: int = 0


class MetricsServer:
    """Plain HTTP or, with `listening`, TLS; for everybody or, with `access`, for whom that lets in.

    `async with MetricsServer(metrics, host, port) as server: server.port`.
    """

    def __init__(
        self,
        metrics: Metrics,
        host: str = "0.0.0.0",
        port: int = 0,
        *,
        access: Access | None = None,
        listening: Listening | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`listening`: how it is served over TLS, in place of `host` and `port`. `monotonic`: seconds."""
        self._metrics, self._access, self._monotonic = metrics, access, monotonic
        listening = listening or Listening(None, (), host, port, MAX_CONNECTIONS, CONNECTION_SECONDS)
        self._server = HttpServer("metrics", self._answer, listening, metrics)
        self._texts: dict[str, _Text] = {}
        self._encoding = asyncio.Lock()

    @property
    def port(self) -> int:
        return self._server.port

    async def __aenter__(self) -> Self:
        """Raises OSError, tls.TlsError."""
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != PATH:
            return web.Response(status=404, text=f"the only path is {PATH}\n")
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, headers={"Allow": "GET, HEAD"}, text="use GET\n")
        if self._access:
            code = await self._access.check(request.headers.get("Authorization", ""), request.remote)
            if code != 200:
                headers = {"WWW-Authenticate": "Bearer"} if code == 401 else {}
                return web.Response(status=code, headers=headers, text=f"{MEANINGS[code]}\n")
            self._server.vouch(request)
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        if request.method == "HEAD":
            return web.Response(headers={"Content-Type": content_type})
        text = self._texts.setdefault(content_type, _Text())
        text.readers += 1
        try:
            return await self._send(request, content_type, await self._body(text, encode))
        finally:
            text.readers -= 1
            if not text.readers:
                self._texts.pop(content_type, None)

    async def _body(self, text: _Text, encode: Callable[[Collector], bytes]) -> bytes:
        async with self._encoding:
            now = self._monotonic()
            if text.readers <= UNSHARED or now - text.made >= SHARED_SECONDS:
                # A thousand jobs are a megabyte of text, and a third of a second in which reconciles would wait.
                snapshot = _Snapshot(list(self._metrics.registry.collect()))
                text.body, text.made = await asyncio.to_thread(encode, snapshot), now
            return text.body

    async def _send(self, request: web.BaseRequest, content_type: str, body: bytes) -> web.StreamResponse:
        """In pieces, each of which waits for its reader: no copy of the whole is made for anybody."""
        response = web.StreamResponse(headers={"Content-Type": content_type, "Content-Length": str(len(body))})
        response.force_close()
        self._server.answers(request)
        await response.prepare(request)
        for start in range(0, len(body), CHUNK):
            await response.write(body[start : start + CHUNK])
        return response


class _Snapshot(Collector):
    """What was collected on the event loop, to which all counters belong."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
