"""A server over TLS: it shows what its folder holds, also after that was renewed, and cuts off who dawdles."""

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509

from finetune_operator import serving, tls
from finetune_operator.certificates import renewed
from finetune_operator.metrics import Metrics
from finetune_operator.serving import HttpServer, Listening
from support.waiting import eventually

pytestmark = pytest.mark.integration
HOSTS = ("127.0.0.1",)
FILES = ("tls.crt", "tls.key", "ca.crt")
"""What a pod gets of the Secret: not the authority's key."""


async def hello(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(text="hello\n")


@asynccontextmanager
async def served(folder: Path, **options: Any) -> AsyncIterator[HttpServer]:
    bounds = {"max_connections": 4, "connection_seconds": 5.0} | options
    server = HttpServer("server", hello, Listening(folder, HOSTS, "127.0.0.1", 0, **bounds), Metrics())
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def shown(port: int) -> bytes:
    """The certificate that a client sees, DER."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return found
    finally:
        writer.close()


async def test_what_the_certificates_job_renews_is_served_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "TLS_REFRESH_SECONDS", 0.05)
    now = datetime.datetime.now(datetime.UTC)

    def write(data: dict[str, bytes]) -> None:
        for name in FILES:
            (tmp_path / name).write_bytes(data[name])

    # Of some time ago, so that the next run finds that it comes to its end.
    first = renewed({}, HOSTS, now - tls.LIFETIME + tls.RENEW_BEFORE - datetime.timedelta(days=1))
    write(first)
    async with served(tmp_path) as server:
        before = await shown(server.port)
        second = renewed(first, HOSTS, now)
        assert second["ca.crt"] == first["ca.crt"]
        write(second)
        after = await eventually(lambda: shown(server.port), "another certificate", until=lambda der: der != before)
    authority = x509.load_pem_x509_certificate(second["ca.crt"])
    x509.load_der_x509_certificate(after).verify_directly_issued_by(authority)


async def test_whoever_dawdles_is_cut_off(tmp_path: Path) -> None:
    async with served(tmp_path, connection_seconds=0.2) as server:
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=context)
        writer.write(b"POST / HTTP/1.1\r\n")
        await writer.drain()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ssl.SSLError)):
            await asyncio.wait_for(reader.readexactly(1), 10)
        writer.close()
