"""Processes of the benchmark, and what can be seen of them from outside."""

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import yaml

Object = dict[str, Any]


class Child:
    """A process that says JSON lines; its log goes to a file."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, end: signal.Signals | None) -> None:
        self.process, self.log, self.end = process, log, end

    @classmethod
    async def start(
        cls, log: Path, *command: str, env: dict[str, str] | None = None, end: signal.Signals | None = None
    ) -> Self:
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                env=os.environ | (env or {}),
            )
        return cls(process, log, end)

    async def line(self) -> Object:
        assert self.process.stdout
        text = await self.process.stdout.readline()
        if not text:
            raise RuntimeError(f"a part of the benchmark ended: {self.tail()}")
        said: Object = json.loads(text)
        return said

    def tell(self, **fields: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(fields).encode() + b"\n")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    async def stop(self) -> None:
        """Ends its input, which our parts understand, or sends its signal; SIGKILL where that is not enough."""
        assert self.process.stdin
        self.process.stdin.close()
        for end in (self.end, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                if end is not None:
                    self.process.send_signal(end)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.communicate(), 10)
                return

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) / 1024 if found else 0.0


@asynccontextmanager
async def child(
    log: Path, *command: str, env: dict[str, str] | None = None, end: signal.Signals | None = None
) -> AsyncIterator[Child]:
    started = await Child.start(log, *command, env=env, end=end)
    try:
        yield started
    finally:
        await started.stop()


def fetch(kubeconfig: Path, path: str) -> str:
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    request = urllib.request.Request(cluster["server"] + path, headers={"Authorization": f"Bearer {user['token']}"})
    try:
        with urllib.request.urlopen(request, context=context, timeout=30) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        return str(error)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Operator:
    """The operator's real process, and what its metrics say."""

    def __init__(self, started: Child, port: int) -> None:
        self.child, self.port = started, port
        self.began = time.monotonic()

    def metric(self, name: str, **labels: str) -> float:
        """The sum over a metric's series with these labels; 0 while nothing listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
                text = response.read().decode()
        except OSError:
            return 0.0
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = (line for line in text.splitlines() if re.match(rf"{name}[{{ ]", line))
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted))

    def looked_at(self) -> float:
        """How many jobs it knows the state of; 0 while any is on its queue."""
        known = self.metric("finetune_operator_jobs")
        return 0.0 if self.metric("finetune_operator_queue_depth") else known

    def reads(self) -> float:
        """Requests to the API server that wrote nothing; watches apart."""
        return self.metric("finetune_operator_api_requests_total", verb="GET")
