"""A server of the operator's over real sockets: it shows what its folder holds, also after that was renewed, cuts off
who dawdles, gives the place of who is silent to who speaks, and answers one request of a connection."""

import asyncio
import contextlib
import datetime
import gc
import re
import socket
import ssl
from asyncio import sslproto
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from prometheus_client import generate_latest

from finetune_operator import serving, tls
from finetune_operator.acceptor import TLS_BUFFER_BYTES
from finetune_operator.certificates import renewed
from finetune_operator.metrics import Metrics
from finetune_operator.serving import HttpServer, Listening
from support.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
HOSTS = ("127.0.0.1",)
FILES = ("tls.crt", "tls.key", "ca.crt")
"""What a pod gets of the Secret: not the authority's key."""
REQUEST = b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n"
NO_HELLO = bytes.fromhex("1603010004ffffffff")
"""A whole record, and no handshake."""
HALF_A_HELLO = bytes.fromhex("16030100f8010000f40303")


class Served(HttpServer):
    """Says hello, and keeps what it was asked for."""

    def __init__(self, listening: Listening) -> None:
        self.metrics = Metrics()
        super().__init__("server", self.hello, listening, self.metrics)
        self.asked: list[str] = []

    async def hello(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request.raw_path)
        if request.path == "/broken":
            raise OverflowError("a mistake of ours")
        return web.Response(text="hello\n")

    def counted(self, name: str) -> float:
        return float(self.metrics.registry.get_sample_value(f"finetune_operator_{name}") or 0.0)

    def became(self, result: str) -> float:
        labels = {"server": "server", "result": result}
        return self.metrics.registry.get_sample_value("finetune_operator_connections_total", labels) or 0.0


@asynccontextmanager
async def served(folder: Path | None, **options: Any) -> AsyncIterator[Served]:
    """`folder` None: without TLS."""
    bounds = {"max_connections": 4, "connection_seconds": 5.0} | options
    server = Served(Listening(folder, HOSTS, "127.0.0.1", 0, **bounds))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def anybody() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def connect(server: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port, ssl=anybody())


async def ask(server: Served, data: bytes = REQUEST, *, secure: bool = True) -> bytes:
    """All that comes back until the server hangs up."""
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=anybody() if secure else None)
        answer = b""
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
        writer.close()
        return answer


async def shown(port: int) -> bytes:
    """The certificate that a client sees, DER."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=anybody())
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


@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"])
async def test_whoever_dawdles_is_cut_off(tmp_path: Path, sent: bytes) -> None:
    async with served(tmp_path, connection_seconds=0.3) as server:
        reader, writer = await connect(server)
        writer.write(sent)
        await writer.drain()
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while await reader.read(4096):
                    pass
        writer.close()


async def test_silent_peers_give_way_to_who_speaks(tmp_path: Path) -> None:
    """All of them from one address, as API servers behind a NAT are."""
    async with served(tmp_path, max_connections=6, connection_seconds=60.0) as server:
        idle = [await connect(server) for _ in range(6)]
        for _ in range(8):
            assert (await ask(server)).endswith(b"hello\n")
        assert server.became("evicted") >= 1
        for _, writer in idle:
            writer.transport.abort()


@pytest.mark.parametrize("sent", [b"", HALF_A_HELLO[:1], HALF_A_HELLO])
async def test_who_has_not_begun_a_handshake_takes_no_seat(tmp_path: Path, sent: bytes) -> None:
    async with served(tmp_path, max_connections=1, max_waiting=20) as server:
        silent = []
        for _ in range(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            silent.append((reader, writer))
        assert (await ask(server)).endswith(b"hello\n")
        assert server.became("seated") == 1
        assert server.became("evicted") + server.became("refused") >= 10, "they wait in a queue with an end"
        for _, writer in silent:
            writer.close()


async def test_a_hello_in_pieces_is_a_hello(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        client = anybody()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = client.wrap_bio(incoming, outgoing)
        with pytest.raises(ssl.SSLWantReadError):
            session.do_handshake()
        hello = outgoing.read()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(hello), 100):
            writer.write(hello[start : start + 100])
            await writer.drain()
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert (await reader.readexactly(1))[0] == 0x16, "the server's part of the handshake"
        writer.close()


async def test_handshakes_that_fail_leave_nothing_to_collect(tmp_path: Path) -> None:
    """Each would be 32 KiB and more that wait for the garbage collector, some hundred times a second."""
    whole = HALF_A_HELLO[:3] + (len(HALF_A_HELLO) - 5).to_bytes(2) + HALF_A_HELLO[5:]
    async with served(tmp_path, max_connections=40) as server:
        gc.collect()
        gc.disable()
        try:
            for _ in range(40):
                await ask(server, NO_HELLO, secure=False)
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(whole)
                writer.transport.abort()
            await eventually(ended, "connections that are gone")
            left = [o for o in gc.get_objects() if isinstance(o, sslproto.SSLProtocol) and not o._app_transport]
            assert len(left) < 8, "the last ones may still be on their way"
        finally:
            gc.enable()


async def ended() -> bool:
    await asyncio.sleep(0.1)
    return all(not task.get_coro().__qualname__.startswith("Acceptor._serve") for task in asyncio.all_tasks())  # type: ignore[union-attr]


async def test_a_connection_has_a_small_buffer(tmp_path: Path) -> None:
    async with served(tmp_path) as server:
        _, writer = await connect(server)
        buffers = [len(o.get_buffer(-1)) for o in gc.get_objects() if isinstance(o, sslproto.SSLProtocol)]
        assert buffers
        assert max(buffers) <= TLS_BUFFER_BYTES
        writer.close()


async def test_a_mistake_of_ours_ends_one_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with served(tmp_path) as server:
        for _ in range(2):
            answer = await ask(server, REQUEST.replace(b"/hello", b"/broken"))
            assert answer.startswith(b"HTTP/1.1 500 ")
            assert b"OverflowError" not in answer
        assert (await ask(server)).endswith(b"hello\n")
        assert b'failed_requests_total{server="server"} 2.0' in generate_latest(server.metrics.registry)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "the server could not answer"
    ] * 2


POST = b"POST /validate HTTP/1.1\r\nHost: a\r\n"
SMUGGLED = b"POST /smuggled HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
ODD: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "a second request behind the first": (POST + b"Content-Length: 2\r\n\r\n{}", (200,)),
    "both lengths": (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400,)),
    "both lengths, the other way round": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 99\r\n\r\n0\r\n\r\n",
        (400,),
    ),
    "two lengths": (POST + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED), (400,)),
    "one length twice": (POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n", (400,)),
    "a list of lengths": (POST + b"Content-Length: 0, 5\r\n\r\n", (400,)),
    "a length with a sign": (POST + b"Content-Length: +2\r\n\r\n{}", (400,)),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", (400,)),
    "a length beyond any number": (POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n", (400,)),
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", (411,)),
    "another encoding": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", (400,)),
    "a blank before the colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", (400,)),
    "a folded header": (POST + b"X: a\r\n Content-Length: 4\r\nContent-Length: 0\r\n\r\n", (400,)),
    "bare line feeds": (b"POST /validate HTTP/1.1\nHost: a\nContent-Length: 0\n\n", (400,)),
    "a bare carriage return": (POST + b"X: a\rContent-Length: 50\r\nContent-Length: 0\r\n\r\n", (400,)),
    "a chunk's extension of megabytes": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 3_000_000 + b"\r\n{}\r\n0\r\n\r\n",
        (411,),
    ),
    "trailers": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nContent-Length: 40\r\n\r\n", (400, 411)),
    "an absolute target": (b"POST http://evil/validate HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", (400,)),
    "CONNECT": (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", (400,)),
    "the target *": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", (400,)),
    "websocket": (POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n", (400,)),
    "h2c": (POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n", (400,)),
    "HTTP/2 at once": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", (400,)),
    "Expect": (POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}", (417,)),
    "HTTP/0.9": (b"GET /\r\n", (400,)),
    "HTTP/1.2": (b"POST /validate HTTP/1.2\r\nHost: a\r\nContent-Length: 0\r\n\r\n", (400,)),
    "two hosts": (b"POST /validate HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 0\r\n\r\n", (400,)),
    "many headers": (POST + b"".join(b"X%d: y\r\n" % n for n in range(5000)) + b"\r\n", (400,)),
    "a long header": (POST + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n", (400,)),
    "a long target": (b"POST /" + b"y" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", (400,)),
    "a NUL in a value": (POST + b"X: a\0b\r\nContent-Length: 0\r\n\r\n", (400,)),
    "a NUL in a name": (POST + b"X\0Y: a\r\nContent-Length: 0\r\n\r\n", (400,)),
    "a NUL in the target": (b"POST /val\0idate HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", (400,)),
    "a thousand requests": (SMUGGLED.replace(b"/smuggled", b"/first") * 1000, (200,)),
}


@pytest.mark.parametrize("name", ODD)
async def test_a_second_request_is_neither_heard_nor_answered(tmp_path: Path, name: str) -> None:
    sent, statuses = ODD[name]
    async with served(tmp_path) as server:
        answer = await ask(server, sent + SMUGGLED)
        found = [int(status) for status in re.findall(rb"(?m)^HTTP/1\.[01] (\d{3}) ", answer)]
        # A sender of megabytes may be cut off before it reads what was said.
        assert len(found) <= 1, answer[:500]
        assert set(found) <= set(statuses)
        assert found or len(sent) > 10_000, "it was told what was wrong"
        assert len(server.asked) <= (1 if 200 in statuses else 0)
        assert "/smuggled" not in server.asked
        assert (await ask(server)).endswith(b"hello\n")
