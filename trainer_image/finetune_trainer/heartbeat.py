"""Signs of life: each process of a pod keeps a small file that says where it is and when it last got on.

The launcher reads it (see `hangs`). A thread writes it once a second: a process that is stopped, or that holds the
interpreter for ever, is told from one that waits for another. SIGUSR1 makes a process write the stacks of its threads.
"""

import faulthandler
import os
import signal
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from finetune_api.progress import Phase

SECONDS = 1.0
STACK_SIGNAL = signal.SIGUSR1
_SIZE = 512
_STEPS = 32
"""So many of the last steps make a pace."""


class Beat(BaseModel):
    """All times are of CLOCK_MONOTONIC, which the processes of a pod share."""

    model_config = ConfigDict(extra="forbid")
    pid: int
    phase: Phase | Literal["Pulling"] = "Loading"
    step: int | None = None
    """The last that was finished."""
    pace: float | None = None
    """Median seconds of the last steps."""
    progress: float
    """When it last got on."""
    alive: float
    """When this was written."""


class _Heart:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self._stack = stack_of(path).open("wb", buffering=0)
        now = time.monotonic()
        self._beat = Beat(pid=os.getpid(), progress=now, alive=now)
        self._lock = threading.Lock()
        self._took: deque[float] = deque(maxlen=_STEPS)
        self._began: float | None = None
        self.write()
        faulthandler.register(STACK_SIGNAL, self._stack, all_threads=True)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def beat(self) -> None:
        self._beat.progress = time.monotonic()

    def enter(self, phase: Phase | Literal["Pulling"]) -> None:
        self._beat.phase = phase
        self.beat()
        self.write()

    def begin(self) -> None:
        self.beat()
        self._began = self._beat.progress

    def step(self, step: int) -> None:
        self.beat()
        if self._began is not None:
            self._took.append(self._beat.progress - self._began)
            self._beat.pace = statistics.median(self._took)
        self._beat.step = step
        self.write()

    def write(self) -> None:
        with self._lock:
            self._beat.alive = time.monotonic()
            # Always of one size and in one place: it takes no more of a disk that may be full.
            os.pwrite(self._file.fileno(), self._beat.model_dump_json().encode().ljust(_SIZE), 0)

    def _run(self) -> None:
        while True:
            time.sleep(SECONDS)
            self.write()


_heart: _Heart | None = None


def start(path: Path) -> None:
    """Once for each process; what does not start one says nothing."""
    global _heart
    _heart = _Heart(path)


def beat() -> None:
    """It got on: some bytes, a batch, a token. Costs nothing."""
    if _heart:
        _heart.beat()


def enter(phase: Phase | Literal["Pulling"]) -> None:
    if _heart:
        _heart.enter(phase)


def begin() -> None:
    """A step begins."""
    if _heart:
        _heart.begin()


def step(step: int) -> None:
    """An optimizer step is done."""
    if _heart:
        _heart.step(step)


def read(path: Path) -> Beat | None:
    """None where there is none, or half of one."""
    try:
        return Beat.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def stack_of(path: Path) -> Path:
    """Where the stacks of a process are written whose heartbeat is at `path`."""
    return path.with_suffix(".stack")
