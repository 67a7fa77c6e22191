"""One line per event on stdout: JSON where a machine reads, plain words where a person looks on."""

import datetime
import json
import os
import sys
import threading
import time
import traceback
from typing import Any

from finetune_api.printable import indented, printable


def event(name: str, level: str = "info", **fields: Any) -> None:
    """Write one event. Fields must be JSON values; what is not is written as its `str`."""
    rank = os.environ.get("RANK")
    if sys.stdout.isatty():
        words = printable(" ".join(f"{key}={value}" for key, value in fields.items()))
        line = f"{name} {words}".rstrip() if level == "info" else f"{level}: {name} {words}".rstrip()
    else:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head: dict[str, Any] = {"time": now, "level": level, "event": name}
        if rank is not None:
            head["rank"] = int(rank)
        line = json.dumps(head | fields, default=str)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def stack(error: BaseException) -> None:
    """Write the stack of a mistake of ours to stderr, indented: what it quotes cannot pass for a line of its own."""
    sys.stderr.write(indented("".join(traceback.format_exception(error)).rstrip()) + "\n")
    sys.stderr.flush()


class Progress:
    """How far a long piece of work is: a bar on a terminal, one structured line per `every` seconds elsewhere.

    `total` is None where the end is not known. `add` may be called from any thread. The last state is always written.
    """

    def __init__(self, name: str, total: int | None, unit: str = "", every: float = 10.0) -> None:
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.done = 0
        self._lock = threading.Lock()
        self._bar = sys.stdout.isatty()
        self._shown = self._started = time.monotonic()

    def add(self, amount: int) -> None:
        with self._lock:
            self.done += amount
            now = time.monotonic()
            if now - self._shown >= (0.1 if self._bar else self.every):
                self._shown = now
                self._show()

    def close(self) -> None:
        self._show()
        if self._bar:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def _show(self) -> None:
        seconds = time.monotonic() - self._started
        if not self._bar:
            fields: dict[str, Any] = {"total": self.total} if self.total is not None else {}
            event(self.name, done=self.done, unit=self.unit, seconds=round(seconds, 1), **fields)
            return
        share = min(1.0, self.done / self.total) if self.total else 0.0
        bar = "█" * round(30 * share) + "░" * (30 - round(30 * share)) if self.total else ""
        of = f"/{self.total:,}" if self.total is not None else ""
        sys.stdout.write(f"\r{self.name} {bar} {self.done:,}{of} {self.unit} {seconds:.0f}s ")
        sys.stdout.flush()
