"""The progress server against bytes of a stranger's choice, below HTTP and within it: it answers or hangs up, says why
in a metav1.Status, logs no error of its own, and goes on serving."""

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from finetune_operator.progress import ProgressServer
from support.api import Api
from support.reporting import STATUS, Post, Reporting, install_crds, kube_cluster, progress_server

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
Served = tuple[ProgressServer, Post, Reporting, str]
ODD = [
    b"\r\n",
    b"\n",
    b"\0",
    b"\xff" * 9,
    b"%00",
    b"..",
    b" ",
    b"\t",
    b": ",
    b"HTTP/9.9",
    b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked, identity\r\n",
    b"Transfer-Encoding: gzip\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    b"X: " + b"y" * 20_000 + b"\r\n",
    b"Host: " + b"h" * 300 + b"\r\n",
    b"Authorization: Bearer " + b"z" * 9_000 + b"\r\n",
]
"""What is put into a request, whole or instead of something."""


@pytest.fixture
async def served(cluster: "Sandbox", api: Api, namespace: str, tmp_path: Path) -> AsyncIterator[Served]:
    await install_crds(api)
    job = await Reporting.create(api, namespace)
    attempt = await job.attempt(0)
    await job.set_status(attempts=[attempt.entry()])
    async with (
        kube_cluster(cluster.kubeconfig) as kube,
        progress_server(kube, tmp_path, connection_seconds=2.0, stranger_burst=10_000.0) as (server, post),
    ):
        yield server, post, job, await job.token(attempt.pod)


async def send(port: int, data: bytes, trust: ssl.SSLContext | None) -> bytes:
    """What comes back until the server hangs up; empty where it says nothing."""
    try:
        async with asyncio.timeout(8):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=trust, server_hostname="127.0.0.1" if trust else None
            )
            writer.write(data)
            writer.write_eof() if writer.can_write_eof() else None
            answer = await reader.read()
            writer.close()
            return answer
    except (ConnectionError, ssl.SSLError):
        return b""


def request(job: Reporting, token: str, rng: random.Random) -> bytes:
    """A report that would be taken, with some bytes otherwise."""
    body = b'{"trainerStatus": {"progressPercentage": 1}}'
    lines = [
        b"POST " + job.path.encode() + b" HTTP/1.1\r\n",
        b"Host: 127.0.0.1\r\n",
        b"Content-Type: application/json\r\n",
        b"Authorization: Bearer " + token.encode() + b"\r\n",
        b"Content-Length: %d\r\n" % len(body),
        b"\r\n",
        body,
    ]
    for _ in range(rng.randint(1, 3)):
        place, odd = rng.randrange(len(lines)), rng.choice(ODD)
        match rng.randrange(4):
            case 0:
                lines.insert(place, odd)
            case 1:
                lines[place] = odd
            case 2:
                at = rng.randrange(len(lines[place]) + 1)
                lines[place] = lines[place][:at] + odd + lines[place][at:]
            case _:
                lines[place] = lines[place][: rng.randrange(len(lines[place]) + 1)]
    return b"".join(lines)


async def test_no_bytes_make_it_fail(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    server, post, job, token = served
    trust = ssl.create_default_context(cafile=post.ca)
    rng = random.Random(11)
    statuses: set[int] = set()
    for _ in range(8):
        batch = [request(job, token, rng) for _ in range(25)]
        for answer in await asyncio.gather(*(send(server.port, data, trust) for data in batch)):
            if answer:
                statuses.add(int(answer.split(b" ", 2)[1]))
    assert statuses - {100, 200, 400, 401, 403, 404, 405, 413, 415, 422, 429} == set()
    assert {400, 401, 415} <= statuses, "they are as odd as they were meant to be"
    (await post(job.path, token, STATUS)).must(200)
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == []


async def test_what_is_no_tls_is_hung_up_on(served: Served) -> None:
    server, post, job, token = served
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 4000, bytes(range(256)) * 64):
        # OpenSSL may say in an alert why it hangs up.
        assert len(await send(server.port, data, None)) < 20
    (await post(job.path, token, STATUS)).must(200)


async def test_who_says_nothing_keeps_nobody_waiting(served: Served) -> None:
    server, post, job, token = served
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    try:
        (await post(job.path, token, STATUS)).must(200)
    finally:
        for one in silent:
            one.close()
