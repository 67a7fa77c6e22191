"""The clusters that the tests of a run share: on a real control plane where `$KUBEBUILDER_ASSETS` names one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

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


@contextmanager
def running(directory: Path, **options: Any) -> Iterator[Sandbox]:
    """A sandbox with these options, in a thread of its own: for fixtures and for tests that are not coroutines."""
    from finetune_sandbox.up import Sandbox  # here, so that the unit tests need not wait for it

    loop = LoopThread()
    try:
        sandbox = Sandbox(directory, **options)
        loop.run(sandbox.start())
        try:
            yield sandbox
        finally:
            loop.run(sandbox.stop())
    finally:
        loop.close()
