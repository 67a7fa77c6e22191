"""Serving over TLS: what the progress server and the admission webhook have in common."""

import asyncio
import datetime
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from finetune_operator import tls

logger = logging.getLogger(__name__)

TLS_REFRESH_SECONDS = 300.0
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and what it bears. `tls_folder`, `hosts`: see `tls.ensure`."""

    tls_folder: Path
    hosts: Sequence[str]
    host: str
    port: int
    """0: chosen by the kernel."""
    max_connections: int
    connection_seconds: float
    """From the connection's first byte to the last answer's last one."""


class TooLarge(Exception):
    """A body has more bytes than it may."""


async def body_of(request: web.BaseRequest, limit: int) -> bytes:
    """At most `limit` bytes are read. Raises TooLarge."""
    if (request.content_length or 0) > limit:
        raise TooLarge
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise TooLarge
    return bytes(body)


def bearer(authorization: str) -> str | None:
    """The token of an Authorization header; None where it is none."""
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token and token.isascii() else None


def _is_news(record: logging.LogRecord) -> bool:
    """Not what is no HTTP: strangers could fill the log with it, a stack for each of their requests."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, HttpProcessingError)


_http_logger = logger.getChild("http")
_http_logger.addFilter(_is_news)


class _Connections(web.Server):
    """At most `limit` connections, each for `seconds` in all: whoever dawdles over headers or body is cut off."""

    def __init__(self, handler: Any, *, limit: int, seconds: float) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            lingering_time=2.0,
            logger=_http_logger,
        )
        self._limit, self._seconds = limit, seconds
        self._deadlines: dict[web.RequestHandler, asyncio.TimerHandle] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        seconds = self._seconds if len(self._deadlines) < self._limit else 0.0
        self._deadlines[handler] = asyncio.get_running_loop().call_later(seconds, transport.abort)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self._deadlines.pop(handler).cancel()
        super().connection_lost(handler, exc)


class TlsServer:
    """Answers with `handler` over TLS. `name` says in the log which server it is."""

    def __init__(
        self, name: str, handler: Handler, listening: Listening, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock`: seconds since the epoch."""
        self._name, self._handler, self._listening, self._clock = name, handler, listening, clock
        self.port = listening.port

    async def start(self) -> None:
        """Listens. Raises tls.TlsError, OSError."""
        listening = self._listening
        files = self._ensure_certificate()
        context = files.context()
        self._connections = _Connections(
            self._handler, limit=listening.max_connections, seconds=listening.connection_seconds
        )
        self._server = await asyncio.get_running_loop().create_server(
            self._connections,
            listening.host,
            listening.port,
            ssl=context,
            ssl_handshake_timeout=5.0,
            ssl_shutdown_timeout=2.0,
            backlog=512,
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._task = asyncio.create_task(self._refresh_certificate(context, files), name=f"{self._name}'s certificate")

    async def stop(self) -> None:
        """Answers what has begun, for two seconds, and takes no more."""
        self._server.close()
        self._connections.pre_shutdown()
        await self._connections.shutdown(timeout=2.0)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _ensure_certificate(self) -> tls.TlsFiles:
        now = datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)
        return tls.ensure(self._listening.tls_folder, self._listening.hosts, now)

    async def _refresh_certificate(self, context: ssl.SSLContext, files: tls.TlsFiles) -> None:
        """Serves what was renewed, by us or by whoever fills the folder."""
        version = files.version()
        while True:
            await asyncio.sleep(TLS_REFRESH_SECONDS)
            try:
                files = self._ensure_certificate()
                if files.version() != version:
                    files.load(context)
                    version = files.version()
                    logger.info("the %s's certificate was renewed", self._name)
            except (tls.TlsError, OSError) as error:
                logger.error("the %s's certificate could not be renewed: %s", self._name, error)
