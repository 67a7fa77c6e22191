"""One run of one container as a host process, from its command to its terminated state."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_sandbox import process
from finetune_sandbox.client import Object
from finetune_sandbox.environment import Mount, Place, invocation
from finetune_sandbox.host import Host
from finetune_sandbox.podstatus import timestamp
from finetune_sandbox.quantity import parse

MESSAGE_BYTES = 4096
LOG_BYTES, LOG_LINES = 2048, 80


class StartError(Exception):
    """The container's process cannot be started. `waiting`: as for a container that cannot even be created."""

    def __init__(self, message: str, *, waiting: bool = False) -> None:
        super().__init__(message)
        self.waiting = waiting

    def terminated(self, now: str) -> dict[str, Any]:
        return {"exitCode": 128, "reason": "StartError", "message": str(self), "startedAt": now, "finishedAt": now}


@dataclass(frozen=True)
class Frame:
    """What the containers of one pod share; `directory` is the pod's own folder."""

    pod: Object
    place: Place
    directory: Path


def log_file(pod_directory: Path, container: str, restarts: int) -> Path:
    return pod_directory / "containers" / container / f"{restarts}.log"


class ContainerRun:
    """A started container. `result()` is its ContainerStateTerminated."""

    def __init__(self, host: Host, spec: Object, started: process.Process, paths: tuple[Path, Path], id: str) -> None:
        self.process = started
        self.started_at = timestamp(datetime.now(UTC))
        self.id = id
        self.ended = asyncio.Event()
        self.group: Path | None = None
        self._host = host
        self._spec = spec
        self._log, self._message = paths

    @classmethod
    def start(
        cls,
        host: Host,
        frame: Frame,
        spec: Object,
        variables: Mapping[str, str],
        mounts: Sequence[Mount],
        restarts: int,
    ) -> ContainerRun:
        """Raises StartError where there is no command, or no such program or working directory."""
        name = spec["name"]
        log = log_file(frame.directory, name, restarts)
        message, root = log.with_name("termination-log"), log.with_name("root")
        root.mkdir(parents=True, exist_ok=True)
        message.write_bytes(b"")
        own = Mount(spec.get("terminationMessagePath") or "/dev/termination-log", str(message))
        call = invocation(frame.pod, spec, variables, [own, *mounts], frame.place, str(root))
        if not call.command:
            raise StartError(
                f'container "{name}" has no command: the process node runs no images, so the pod must name one',
                waiting=True,
            )
        if (spec.get("restartPolicy") or "Never") != "Never":
            raise StartError(
                f'init container "{name}": restartPolicy Always (a sidecar) is not supported', waiting=True
            )
        base = process.interpreter_environment()
        env = base | dict(call.env) | {"PATH": os.pathsep.join(filter(None, [base["PATH"], call.env.get("PATH")]))}
        working = Path(call.working_dir)
        if not working.is_dir():
            raise StartError(f'working directory "{call.working_dir}" does not exist on the node')
        program = str(working / call.command[0]) if "/" in call.command[0] else call.command[0]
        if shutil.which(program, path=env["PATH"]) is None:
            raise StartError(f'exec: "{call.command[0]}": executable file not found in $PATH')
        limit = ((spec.get("resources") or {}).get("limits") or {}).get("memory")
        id = f"{frame.pod['metadata']['uid']}-{name}-{restarts}"
        group = host.groups.create(id, int(parse(limit))) if limit else None
        started = process.start(call.command, env=env, cwd=working, output=log, cgroup=group, niceness=host.niceness)
        run = cls(host, spec, started, (log, message), f"process://{id}")
        run.group = group
        return run

    async def result(self) -> dict[str, Any]:
        code = await self.process.wait()
        out_of_memory = False
        if self.group:
            out_of_memory = self._host.groups.out_of_memory(self.group)
            await asyncio.to_thread(self._host.groups.remove, self.group)
        self.ended.set()
        state = terminated(code, out_of_memory)
        message = final_message(
            self._message, self._log, self._spec.get("terminationMessagePolicy") or "File", code != 0
        )
        times = {"startedAt": self.started_at, "finishedAt": timestamp(datetime.now(UTC)), "containerID": self.id}
        return state | times | ({"message": message} if message else {})


def terminated(code: int, out_of_memory: bool) -> dict[str, Any]:
    """Exit code, signal and reason; `code` is minus the signal for a process that one killed."""
    state: dict[str, Any] = {"exitCode": code if code >= 0 else 128 - code}
    if code < 0:
        state["signal"] = -code
    if out_of_memory and code != 0:
        state["reason"] = "OOMKilled"
        state["exitCode"] = 128 + signal.SIGKILL if code == -signal.SIGKILL else state["exitCode"]
    else:
        state["reason"] = "Completed" if code == 0 else "Error"
    return state


def final_message(message: Path, log: Path, policy: str, failed: bool) -> str:
    """What the container left in its termination log, or the end of its output by policy FallbackToLogsOnError."""
    with message.open("rb") as file:
        text = file.read(MESSAGE_BYTES)
    if not text and failed and policy == "FallbackToLogsOnError":
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - LOG_BYTES, 0))
            text = b"".join(file.read().splitlines(keepends=True)[-LOG_LINES:])
    return text.decode(errors="replace")
