"""A process that has imported the operator once and forks for each one that a test starts: an import takes two seconds.

What runs is the operator's own `main`, in a process of its own that can be killed; constants of time may be others, so
that minutes become seconds.
"""

import asyncio
import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.operating import Operator

PR_SET_PDEATHSIG = 1


class Nursery:
    """`fork` starts an operator."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def fork(self, environment: Mapping[str, str], log: Path, constants: Mapping[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        request = {"environment": dict(environment), "log": str(log), "constants": dict(constants)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextlib.contextmanager
def nursery() -> Iterator[Nursery]:
    folders = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "support.warm_operator"],
        env=os.environ | {"PYTHONPATH": folders},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the warm operator did not start")
        yield Nursery(process)
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:  # a machine that is busy
            process.kill()
            process.wait()
        process.stdout.close()


@dataclass
class WarmOperator(Operator):
    """An `Operator` that is forked, and started again whenever it ends, as a Deployment would."""

    nursery: Nursery | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    starts: int = 0
    _pid: int = 0
    _gone: asyncio.Event = field(default_factory=asyncio.Event)
    _keeper: asyncio.Task[None] | None = None

    async def start(self, **settings: str) -> None:
        self._fork(self.settings | settings)
        self._keeper = asyncio.create_task(self._keep(self.settings | settings))

    def _fork(self, settings: Mapping[str, str]) -> None:
        assert self.nursery
        self.starts += 1
        gone = self._gone = asyncio.Event()
        self._pid = self.nursery.fork(self.environment(**settings), self.log, self.constants)
        try:
            descriptor = os.pidfd_open(self._pid)
        except ProcessLookupError:
            gone.set()
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            gone.set()

        loop.add_reader(descriptor, ended)

    async def _keep(self, settings: Mapping[str, str]) -> None:
        while True:
            await self._gone.wait()
            await asyncio.sleep(0.1)
            self._fork(settings)

    async def kill(self) -> None:
        """SIGKILL; it is gone when this returns, and comes back."""
        gone = self._gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        await gone.wait()

    async def stop(self) -> int:
        """For good."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            await self.kill()
        return 0


def serve() -> None:
    """Forks for each line of standard input until that ends."""
    for module in ("finetune_operator.__main__", "kopf._core.reactor.running"):
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        print(pid, flush=True)


def become(request: dict[str, Any]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for stream, descriptor in ((0, nothing), (1, log), (2, log)):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    for place, value in request["constants"].items():
        module, _, name = place.rpartition(".")
        found = importlib.import_module(module)
        if not hasattr(found, name):
            raise AttributeError(place)
        setattr(found, name, value)
    code = 1
    try:
        importlib.import_module("finetune_operator.__main__").main()
        code = 0
    except SystemExit as end:
        print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
