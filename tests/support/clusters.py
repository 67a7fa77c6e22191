"""The cluster that the tests of a run share: a real control plane where `$KUBEBUILDER_ASSETS` names one."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
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


@contextmanager
def running_cluster(directory: Path) -> Iterator[Cluster]:
    loop = LoopThread()
    try:
        assets = assets_from_environment()
        if assets is not None:
            plane = loop.run(ControlPlane.start(assets, directory))
            try:
                yield Cluster("kubernetes", plane.kubeconfig)
            finally:
                loop.run(plane.stop())
    finally:
        loop.close()
