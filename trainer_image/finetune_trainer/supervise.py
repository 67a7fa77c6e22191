"""Processes under PID 1: started together, signalled together, each with its own exit code and the end of its output.

One thread: pipes and signals (through a wake-up descriptor) meet in one selector. Nothing is polled but `watch`.
"""

import os
import re
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from finetune_api.printable import printable

TAIL_LINES, LINE_LENGTH = 40, 400
WATCH_SECONDS = 1.0
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass
class Child:
    name: str
    """Prefix of its lines on stdout; "" = they are passed through as they come."""
    pid: int
    pipe: int
    code: int | None = None
    """Exit code, negative for a signal; None while it runs."""
    ended: float = 0.0
    """Seconds since the epoch."""
    killed: bool = False
    """We ended it: its code says nothing about a cause."""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    unfinished: bytes = b""


class Supervisor:
    """Owns the process's signal handlers while it is open; only the main thread may use it."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self.stopped_at: float | None = None
        """When the first SIGTERM or SIGINT came, in seconds since the epoch."""
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._line_open = False
        for end in (self._wake, self._woken):
            end.setblocking(False)

    def __enter__(self) -> "Supervisor":
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._wakeup_before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _noted) for number in (*_FORWARDED, signal.SIGCHLD)}
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        while self.running:
            self.step(None)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._selector.close()
        self._wake.close()
        self._woken.close()

    @property
    def running(self) -> list[Child]:
        return [child for child in self.children if child.code is None]

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Child:
        """Starts a process in a process group of its own; `command[0]` is an absolute path."""
        reader, writer = os.pipe()
        try:
            pid = os.posix_spawn(
                command[0],
                list(command),
                env,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, writer, 1),
                    (os.POSIX_SPAWN_DUP2, writer, 2),
                ],
                setpgroup=0,
                setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGCHLD],
            )
        finally:
            os.close(writer)
        os.set_blocking(reader, False)
        child = Child(name, pid, reader)
        self.children.append(child)
        self._selector.register(reader, selectors.EVENT_READ, child)
        # A signal that came while it was being started found it missing.
        if self.stopped_at is not None:
            os.kill(pid, signal.SIGTERM)
        return child

    def step(self, timeout: float | None) -> None:
        """Waits until something happens, at most `timeout` seconds, and deals with it."""
        for key, _ in self._selector.select(timeout):
            if isinstance(key.data, Child):
                self._read(key.data)
            else:
                self._take_signals()

    def kill(self) -> None:
        """Kills what still runs, with whatever it started."""
        for child in self.running:
            child.killed = True
            _kill_group(child.pid)

    def run(
        self,
        grace: float,
        stop_grace: float,
        patient_codes: Sequence[int] = (),
        watch: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Returns when every child has ended, or where `watch`, asked once a second, says True; that is returned.

        When one fails the others get `grace` seconds to end by themselves, and `stop_grace` seconds after a signal came
        or where the first failure is one of `patient_codes`.
        """
        deadline: float | None = None
        while self.running:
            if deadline is None:
                failed = min((child for child in self.children if child.code), key=lambda c: c.ended, default=None)
                if self.stopped_at is not None or (failed and failed.code in patient_codes):
                    deadline = time.monotonic() + stop_grace
                elif failed:
                    deadline = time.monotonic() + grace
                elif watch():
                    return True
            left = WATCH_SECONDS if deadline is None else deadline - time.monotonic()
            if left <= 0:
                self.kill()
                left = WATCH_SECONDS
            self.step(left)
        return False

    def _take_signals(self) -> None:
        for number in self._woken.recv(4096):
            if number in _FORWARDED and self.stopped_at is None:
                self.stopped_at = time.time()
                for child in self.running:
                    os.kill(child.pid, signal.SIGTERM)
        # Signals coalesce: any one may stand for several ended children, orphans that PID 1 inherited among them.
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            self._reap(ended.si_pid)

    def _reap(self, pid: int) -> None:
        child = next((c for c in self.running if c.pid == pid), None)
        if child is not None:
            # Before it is reaped its process group cannot be another's: what it left behind ends with it.
            _kill_group(pid)
        _, status = os.waitpid(pid, 0)
        if child is None:
            return
        child.code, child.ended = os.waitstatus_to_exitcode(status), time.time()
        self._read(child)
        self._close(child)

    def _read(self, child: Child) -> None:
        while child.pipe >= 0:
            try:
                data = os.read(child.pipe, 65536)
            except BlockingIOError:
                return
            if not data:
                self._close(child)
                return
            self._show(child, data)

    def _show(self, child: Child, data: bytes) -> None:
        *lines, child.unfinished = (child.unfinished + data).split(b"\n")
        # What never ends a line (a bar that rewrites itself) must not grow without bound.
        child.unfinished = child.unfinished[-65536:]
        for line in lines:
            text = _plain(line).strip()
            if text:
                child.tail.append(text[:LINE_LENGTH])
        if not child.name:
            sys.stdout.buffer.write(data)
            self._line_open = not data.endswith(b"\n")
        elif lines:
            lead = b"\n" if self._line_open else b""
            self._line_open = False
            prefix = f"[{child.name}] ".encode()
            sys.stdout.buffer.write(lead + b"".join(prefix + _plain(line).encode() + b"\n" for line in lines))
        sys.stdout.buffer.flush()

    def _close(self, child: Child) -> None:
        if child.pipe < 0:
            return
        self._selector.unregister(child.pipe)
        os.close(child.pipe)
        child.pipe = -1
        if child.unfinished:
            self._show(child, b"\n")


def _plain(line: bytes) -> str:
    """A line as it was left on a terminal, without colours and with nothing else that a terminal would obey."""
    text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
    return printable(_ANSI.sub("", text).expandtabs())


def _noted(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor carries the signal; a handler must exist for it to do so."""


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
