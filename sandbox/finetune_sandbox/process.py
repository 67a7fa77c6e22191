"""Host processes that cannot outlive the one that started them. Linux only (see shim.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SHIM = Path(__file__).with_name("shim.py")


class Process:
    """A running command with everything below it. Await `wait()`, once or often: the exit code, or minus the signal."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self._killed = False
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pidfd = os.pidfd_open(popen.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """The process id of the shim, whose only lasting child is the command."""
        return self._popen.pid

    def command_pid(self) -> int | None:
        """The process id of the command; None where it has not begun or has ended."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return int(children[0]) if children else None

    def _reap(self) -> None:
        code = self._popen.poll()
        if code is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            if not self._ended.done():
                # A shim that had not begun yet dies of SIGUSR1 itself, and nothing was started.
                self._ended.set_result(-signal.SIGKILL if self._killed and code == -signal.SIGUSR1 else code)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """SIGTERM to the command alone."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the command and everything it started."""
        self._killed = True
        self._signal(signal.SIGUSR1)

    def _signal(self, number: int) -> None:
        if self._popen.returncode is None:
            self._popen.send_signal(number)


def start(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    output: Path,
    cgroup: Path | None = None,
    niceness: int = 0,
) -> Process:
    """Starts `command` with exactly `env`, in a session of its own, stdout and stderr appended to `output`.

    Needs a running event loop. It is killed with all below it when the calling thread's process ends, however it ends.
    """
    with output.open("ab") as stream:
        popen = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(SHIM)),
                *(str(os.getpid()), str(cgroup or "-"), str(niceness)),
                *command,
            ],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Process(popen)


def interpreter_environment() -> dict[str, str]:
    """What a process needs to find this interpreter and print UTF-8, and nothing else of this process's environment."""
    env = {
        "PATH": os.pathsep.join(
            [str(Path(sys.executable).parent), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        ),
        "LANG": "C.UTF-8",
    }
    if "LD_LIBRARY_PATH" in os.environ:
        env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return env


def left_behind(folder: Path, prefix: str) -> list[Path]:
    """What lies in `folder` as `<prefix><process id>-…` and whose process is gone: one that was killed left it."""
    return [
        path
        for path in folder.glob(f"{prefix}*")
        if (pid := path.name.removeprefix(prefix).split("-")[0]).isdigit() and not Path(f"/proc/{pid}").exists()
    ]
