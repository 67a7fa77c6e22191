"""Serving HTTP to peers of any kind, bounded in number, time and bytes.

The progress server, the admission webhook, the metrics and the probes have this in common. A connection has one
request; only a caller whom a server knows well may be granted more.
"""

import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from finetune_operator import tls
from finetune_operator.acceptor import Acceptor, Connection, Patience
from finetune_operator.byte_budget import ByteBudget
from finetune_operator.metrics import Metrics
from finetune_operator.seats import Limits, Stage

logger = logging.getLogger(__name__)

TLS_REFRESH_SECONDS = 300.0
MAX_HEADERS = 40
MAX_HEADER_BYTES = 8190
"""Of one header; a token may be some kilobytes."""
READ_BYTES = 16 * 1024
"""What is read ahead of a handler."""
LINGERING_SECONDS = 0.25
"""How long a body that nobody wants is read, so that its sender sees the answer."""
IDLE_SECONDS = 120.0
"""Longer than Go's clients keep a connection that they do not use: it is not this side that ends one in use."""
BODY_SECONDS, BODY_BYTES_PER_SECOND = 2.0, 2 * 1024 * 1024
"""What a body may take: a while, and its size at this pace."""
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and what it bears. Times are in seconds."""

    tls_folder: Path | None
    """See `tls.ensure`, as for `hosts`; None: plain HTTP."""
    hosts: Sequence[str]
    host: str
    port: int
    """0: chosen by the kernel."""
    max_connections: int
    """Those that are served at a time; more wait, and the silent ones give way."""
    connection_seconds: float
    """From the connection's first byte to the last answer's last one."""
    max_waiting: int = 2048
    """Connections that have said nothing yet, or have to wait."""
    rate_per_address: float = 400.0
    """Connections a second of one address, in the long run; `burst_per_address` at once. More have to wait."""
    burst_per_address: float = 1500.0
    client_ca: Path | None = None
    """PEM: the authorities of client certificates, without which no connection is made; None: none is asked for."""

    def limits(self) -> Limits:
        return Limits(
            seats=self.max_connections,
            seats_per_address=max(1, self.max_connections * 7 // 8),
            waiting=self.max_waiting,
            rate_per_address=self.rate_per_address,
            burst_per_address=self.burst_per_address,
        )

    def patience(self) -> Patience:
        default = Patience()
        most = min(default.greeting, self.connection_seconds)
        return Patience(silence=default.silence, greeting=most, whole=self.connection_seconds)


class TooLarge(Exception):
    """A body has more bytes than it may."""


class TooSlow(Exception):
    """A body does not come in the time that its size may take."""


@contextlib.asynccontextmanager
async def body_of(request: web.BaseRequest, limit: int, budget: ByteBudget) -> AsyncIterator[bytearray]:
    """The body, whose bytes are claimed from the budget before any is read, and until the end of the context.

    Raises TooLarge, TooSlow.
    """
    size = request.content_length or 0
    if size > limit:
        raise TooLarge
    async with budget.claim(size):
        yield await _read(request, size)


async def _read(request: web.BaseRequest, size: int) -> bytearray:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS + size / BODY_BYTES_PER_SECOND):
            async for chunk in request.content.iter_any():
                body += chunk
    except TimeoutError:
        raise TooSlow from None
    return body


def bearer(authorization: str) -> str | None:
    """The token of an Authorization header; None where it is none."""
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token and token.isascii() else None


def oddity(request: web.BaseRequest) -> web.Response | None:
    """Refuses what no caller of ours sends, and what two parsers may read in two ways."""
    headers = request.headers
    if "Transfer-Encoding" in headers:
        return web.Response(status=411, text="found Transfer-Encoding; send the body with a Content-Length\n")
    if "Upgrade" in headers:
        return web.Response(status=400, text="found Upgrade; send a plain request\n")
    if "Expect" in headers:
        return web.Response(status=417, text="found Expect; send the body at once\n")
    if not request.raw_path.startswith("/"):
        return web.Response(status=400, text="the request's target must be a path\n")
    return None


def _is_news(record: logging.LogRecord) -> bool:
    """Not what is no HTTP: strangers could fill the log with it, a stack for each of their requests."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


_http_logger = logger.getChild("http")
_http_logger.addFilter(_is_news)


class _Protocols(web.Server):
    """aiohttp's part: bytes to requests, for connections that were accepted elsewhere."""

    def __init__(self, handler: Any) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            lingering_time=LINGERING_SECONDS,
            logger=_http_logger,
            max_headers=MAX_HEADERS,
            max_field_size=MAX_HEADER_BYTES,
            read_bufsize=READ_BYTES,
            keepalive_timeout=IDLE_SECONDS,
        )
        self.accepted: dict[web.RequestHandler, Connection] = {}

    def protocol(self, connection: Connection) -> web.RequestHandler:
        made = self()
        self.accepted[made] = connection
        return made

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        connection = self.accepted[handler]
        connection.acceptor.made(connection, transport)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        connection = self.accepted.pop(handler)
        connection.acceptor.lost(connection)
        super().connection_lost(handler, exc)


class HttpServer:
    """Answers with `handler`. `name` says in the log and in the metrics which server it is."""

    def __init__(
        self,
        name: str,
        handler: Handler,
        listening: Listening,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: seconds since the epoch."""
        self._name, self._handler, self._listening, self._clock = name, handler, listening, clock
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None
        self.port = listening.port

    async def start(self) -> None:
        """Listens. Raises tls.TlsError, OSError."""
        listening, context = self._listening, None
        if listening.tls_folder:
            files = self._ensure_certificate(listening.tls_folder)
            context = files.context(listening.client_ca)
        self._protocols = _Protocols(self._answer)
        self._acceptor = Acceptor(
            listening.limits(),
            listening.patience(),
            self._protocols.protocol,
            context,
            lambda event: self._metrics.connection(self._name, event),
        )
        self.port = self._acceptor.listen(listening.host, listening.port)
        if listening.tls_folder:
            refresh = self._refresh_certificate(files, listening.tls_folder)
            self._task = asyncio.create_task(refresh, name=f"{self._name}'s certificate")

    async def stop(self) -> None:
        """Answers what has begun, for two seconds, and takes no more."""
        self._acceptor.close()
        self._protocols.pre_shutdown()
        await self._protocols.shutdown(timeout=2.0)
        self._acceptor.drop_all()
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def vouch(self, request: web.BaseRequest, *, keep: bool = False) -> None:
        """Its caller is known: the connection gives way to nobody. `keep`: it may send further requests."""
        if connection := self._protocols.accepted.get(request.protocol):
            connection.kept = keep
        self._advance(request, Stage.PROVEN)

    def answers(self, request: web.BaseRequest) -> None:
        """All is decided: what is left is to send the answer, to one who may read slowly."""
        self._advance(request, Stage.ANSWERED)

    def _advance(self, request: web.BaseRequest, stage: Stage) -> None:
        if (connection := self._protocols.accepted.get(request.protocol)) is not None:
            connection.advance(stage)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self._advance(request, Stage.ASKING)
        connection = self._protocols.accepted.get(request.protocol)
        response: web.StreamResponse | None
        try:
            response = oddity(request) or await self._handler(request)
            keep = connection is not None and connection.kept and response.status == 200
        except Exception:
            keep = False
            # A mistake of ours ends one request. It is counted, and told once for each.
            logger.exception("the %s could not answer", self._name)
            self._metrics.request_failed(self._name)
            response = web.Response(status=500, text="the request could not be handled; the operator's log says why\n")
        if not keep:
            # A second request behind the first could be somebody else's: its bytes are never looked at.
            response.force_close()
            if connection:
                connection.kept = False
        self.answers(request)
        return response

    def _ensure_certificate(self, folder: Path) -> tls.TlsFiles:
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        return tls.ensure(folder, self._listening.hosts, now)

    async def _refresh_certificate(self, files: tls.TlsFiles, folder: Path) -> None:
        """Serves what was renewed, by us or by whoever fills the folder."""
        version = self._version(files)
        while True:
            await asyncio.sleep(TLS_REFRESH_SECONDS)
            try:
                files = self._ensure_certificate(folder)
                if self._version(files) != version:
                    self._acceptor.context = files.context(self._listening.client_ca)
                    version = self._version(files)
                    logger.info("the %s's certificate was renewed", self._name)
            except Exception as error:
                logger.error("the %s's certificate could not be renewed: %s", self._name, error)

    def _version(self, files: tls.TlsFiles) -> tuple[bytes, ...]:
        """What changes when a file does."""
        client_ca = self._listening.client_ca
        return (*files.version(), client_ca.read_bytes() if client_ca else b"")
