"""Hostile peers of one of the operator's ports, as a program: `python flooding.py KIND PORT PEERS SECONDS [JSON]`.

It talks to the loopback address alone and ends by itself. Peers that are cut off come back at once. The last line that
it prints is JSON: how many connections it made, and how many answers it got by their status.
"""

import asyncio
import contextlib
import json
import ssl
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
HELLO = bytes.fromhex("16030100f8010000f40303")
"""How a TLS handshake begins that then stops."""
MIB = 1024 * 1024


def context() -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    return made


@dataclass
class Flood:
    """What is sent, and where. `seen` counts connections and statuses."""

    port: int
    end: float
    options: dict[str, Any]
    tls: ssl.SSLContext = field(default_factory=context)
    seen: Counter[str] = field(default_factory=Counter)

    async def open(self, *, tls: bool = True) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        source = (self.options["source"], 0) if "source" in self.options else None
        self.seen["connections"] += 1
        return await asyncio.open_connection(
            HOST, self.port, ssl=self.tls if tls else None, local_addr=source, limit=4096
        )

    def head(self, length: int) -> bytes:
        lines = [f"POST {self.options.get('path', '/validate')} HTTP/1.1", "Host: a", "Content-Type: application/json"]
        if token := self.options.get("token"):
            lines.append(f"Authorization: Bearer {token}")
        return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()

    async def held(self, reader: asyncio.StreamReader) -> None:
        """Until the server answers and hangs up."""
        answer = await reader.read(4096)
        if answer:
            self.seen[answer.split(b" ", 2)[1].decode(errors="replace")] += 1
            while await reader.read(4096):
                pass


@asynccontextmanager
async def answered_by(flood: Flood, reader: asyncio.StreamReader) -> AsyncIterator[asyncio.Task[None]]:
    """Done when the server has answered and hung up."""
    task = asyncio.create_task(flood.held(reader))
    try:
        yield task
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def idle_tcp(flood: Flood) -> None:
    reader, writer = await flood.open(tls=False)
    with contextlib.closing(writer):
        await flood.held(reader)


async def half_handshake(flood: Flood) -> None:
    reader, writer = await flood.open(tls=False)
    with contextlib.closing(writer):
        writer.write(HELLO)
        await flood.held(reader)


async def broken_handshakes(flood: Flood) -> None:
    reader, writer = await flood.open(tls=False)
    writer.write(HELLO)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(1), flood.options.get("hold", 0.05))
    writer.transport.abort()


async def idle_tls(flood: Flood) -> None:
    reader, writer = await flood.open()
    with contextlib.closing(writer):
        await flood.held(reader)


async def handshakes(flood: Flood) -> None:
    _, writer = await flood.open()
    writer.transport.abort()


async def slow_head(flood: Flood) -> None:
    reader, writer = await flood.open()
    with contextlib.closing(writer):
        async with answered_by(flood, reader) as answered:
            for byte in flood.head(10)[:-2] + b"X-Long: " + b"y" * 100_000:
                writer.write(bytes([byte]))
                await asyncio.wait([answered], timeout=0.2)
                if answered.done() or time.monotonic() > flood.end:
                    break


async def bodies(flood: Flood) -> None:
    """All of a large body but its last bytes."""
    reader, writer = await flood.open()
    with contextlib.closing(writer):
        async with answered_by(flood, reader) as answered:
            writer.write(flood.head(7 * MIB) + b'{"a": "')
            for _ in range(111):
                writer.write(b"x" * 64 * 1024)
                draining = asyncio.ensure_future(writer.drain())
                await asyncio.wait([answered, draining], return_when=asyncio.FIRST_COMPLETED)
                if answered.done():
                    draining.cancel()
                    break


async def slow_body(flood: Flood) -> None:
    reader, writer = await flood.open()
    with contextlib.closing(writer):
        async with answered_by(flood, reader) as answered:
            writer.write(flood.head(60_000))
            while not answered.done() and time.monotonic() < flood.end:
                writer.write(b"x")
                await asyncio.wait([answered], timeout=0.2)


async def slow_reader(flood: Flood) -> None:
    """Asks for the metrics and reads none of them."""
    _, writer = await flood.open(tls=False)
    with contextlib.closing(writer):
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(flood.end - time.monotonic())


async def posts(flood: Flood) -> None:
    """Small reports, one after the other, each on a connection of its own."""
    body = b'{"trainerStatus": {"progressPercentage": 1}}'
    reader, writer = await flood.open()
    with contextlib.closing(writer):
        writer.write(flood.head(len(body)) + body)
        await flood.held(reader)


KINDS: dict[str, Callable[[Flood], Awaitable[None]]] = {
    made.__name__.replace("_", "-"): made
    for made in (
        idle_tcp,
        half_handshake,
        broken_handshakes,
        idle_tls,
        handshakes,
        slow_head,
        bodies,
        slow_body,
        slow_reader,
        posts,
    )
}


async def peer(flood: Flood, act: Callable[[Flood], Awaitable[None]]) -> None:
    while time.monotonic() < flood.end:
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + flood.end - time.monotonic()):
                await act(flood)
        except TimeoutError:
            return
        except (OSError, asyncio.IncompleteReadError):
            flood.seen["cut off"] += 1
        # A peer pauses a little, so that many of them do not come to more than the machine bears.
        await asyncio.sleep(flood.options.get("pause", 0.02))


async def run(kind: str, port: int, peers: int, seconds: float, options: dict[str, Any]) -> Counter[str]:
    flood = Flood(port, time.monotonic() + seconds, options)
    await asyncio.gather(*(peer(flood, KINDS[kind]) for _ in range(peers)))
    return flood.seen


def command(kind: str, port: int, peers: int, seconds: float, **options: Any) -> list[str]:
    """How the program is started."""
    return [sys.executable, str(Path(__file__)), kind, str(port), str(peers), str(seconds), json.dumps(options)]


def main() -> None:
    kind, port, peers, seconds, options = sys.argv[1:]
    seen = asyncio.run(run(kind, int(port), int(peers), float(seconds), json.loads(options)))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
