"""The cluster that the tests of a run share: a real control plane where `$KUBEBUILDER_ASSETS` names one."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune_sandbox.controlplane import ControlPlane, assets_from_environment

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own, for what must outlive the loop of one test."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cluster", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 120.0) -> T:
        """Runs `work` there and waits for its result, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(frozen=True)
class Cluster:
    """An API server with its controllers, and a cluster administrator's kubeconfig."""

    name: Literal["sandbox", "kubernetes"]
    kubeconfig: Path


@asynccontextmanager
async def _kubernetes(assets: Path, directory: Path) -> AsyncIterator[Cluster]:
    async with ControlPlane(assets, directory) as plane:
        yield Cluster("kubernetes", plane.kubeconfig)


@asynccontextmanager
async def _sandbox(directory: Path) -> AsyncIterator[Cluster]:
    from finetune_sandbox.client import Client
    from finetune_sandbox.jobs import JobController
    from finetune_sandbox.server import ApiServer

    server = ApiServer()
    await server.start(directory)
    try:
        async with await Client.from_kubeconfig(server.kubeconfig) as client:
            jobs = JobController(client)
            jobs.start()
            try:
                yield Cluster("sandbox", server.kubeconfig)
            finally:
                await jobs.close()
    finally:
        await server.stop()


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    """No node runs its pods: a suite that needs one starts it."""
    assets = assets_from_environment()
    cluster = _kubernetes(assets, directory) if assets else _sandbox(directory)
    loop = LoopThread()
    try:
        running = loop.run(cluster.__aenter__())
        try:
            yield running
        finally:
            loop.run(cluster.__aexit__(None, None, None))
    finally:
        loop.close()
