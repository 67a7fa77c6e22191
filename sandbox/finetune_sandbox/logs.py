"""A container's output: from its file, and over HTTPS as a kubelet serves it to an API server."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import aiohttp
from aiohttp import web

from finetune_sandbox.certificates import Authority
from finetune_sandbox.client import NODES, PODS, Client

_CHUNK = 64 * 1024
_POLL_SECONDS = 0.1


class LogSource(Protocol):
    def stream(
        self, namespace: str, pod: str, container: str, follow: bool, tail_lines: int | None
    ) -> AsyncIterator[bytes]:
        """The first chunk, at once, is empty; a LookupError in its place: no such container, or it has not started."""
        ...


def tail_offset(path: Path, lines: int | None) -> int:
    """Where the last `lines` lines of a file begin, in bytes; None is all of it."""
    if lines is None:
        return 0
    with path.open("rb") as file:
        end = position = file.seek(0, 2)
        found = b""
        while position > 0 and found.count(b"\n") <= lines:
            position = max(position - _CHUNK, 0)
            file.seek(position)
            found = file.read(end - position)
    wanted = found.splitlines(keepends=True)[-lines:] if lines else []
    return end - sum(len(line) for line in wanted)


async def follow_file(path: Path, offset: int, running: Callable[[], bool]) -> AsyncIterator[bytes]:
    """The file from `offset`, and what is appended while `running()`. The first chunk, at once, is empty."""
    with path.open("rb") as file:
        file.seek(offset)
        yield b""
        while True:
            alive = running()  # asked before reading: what was written before the end is still read
            while chunk := file.read(_CHUNK):
                yield chunk
            if not alive:
                return
            await asyncio.sleep(_POLL_SECONDS)


class NodeLogs:
    """The logs of all process nodes of a cluster, asked for as an API server asks a kubelet."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def stream(
        self, namespace: str, pod: str, container: str, follow: bool, tail_lines: int | None
    ) -> AsyncIterator[bytes]:
        """Raises LookupError where the pod is on no node or its container has not been started."""
        found = await self._client.get(PODS, namespace, pod)
        if not found["spec"].get("nodeName"):
            raise LookupError(f'pod "{namespace}/{pod}" is on no node yet')
        status = (await self._client.get(NODES, None, found["spec"]["nodeName"]))["status"]
        address = next(entry["address"] for entry in status["addresses"] if entry["type"] == "InternalIP")
        port = status["daemonEndpoints"]["kubeletEndpoint"]["Port"]
        query = {"follow": str(follow).lower()} | ({} if tail_lines is None else {"tailLines": str(tail_lines)})
        url = f"https://{address}:{port}/containerLogs/{namespace}/{pod}/{container}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            try:
                # ssl=False as kube-apiserver does without --kubelet-certificate-authority: it is loopback.
                response = await session.get(url, params=query, ssl=False)
            except aiohttp.ClientError as error:
                raise LookupError(f"node {found['spec']['nodeName']} does not answer: {error}") from error
            async with response:
                if response.status != 200:
                    raise LookupError(await response.text())
                yield b""
                async for chunk in response.content.iter_any():
                    yield chunk


class LogServer:
    """`GET /containerLogs/{namespace}/{pod}/{container}?follow&tailLines` on a loopback port, for the API server.

    It authenticates nobody, therefore it listens on loopback only.
    """

    def __init__(self, source: LogSource, address: str) -> None:
        self._source = source
        self._address = address
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> None:
        application = web.Application()
        application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._address, 0, ssl_context=_serving_context(self._address))
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info
        tail = request.query.get("tailLines")
        follow = request.query.get("follow") == "true"
        stream = self._source.stream(
            path["namespace"], path["pod"], path["container"], follow, int(tail) if tail else None
        )
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        try:
            first = await anext(stream, b"")
        except LookupError as error:
            return web.Response(status=400, text=str(error))
        await response.prepare(request)
        if first:
            await response.write(first)
        async for chunk in stream:
            await response.write(chunk)
        return response


def _serving_context(address: str) -> ssl.SSLContext:
    issued = Authority("finetune-process-node").issue("finetune-process-node", hosts=(address,))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:  # mode 0600; the ssl module reads certificates from files only
        file.write(issued.certificate + issued.key)
        file.flush()
        context.load_cert_chain(file.name)
    return context
