"""A function in a child process that may take only so much memory and CPU time: an attack that works ends alone."""

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    answer: Any
    """What the function returned, in JSON; or the kind of exception that it raised, with its text."""
    seconds: float
    """CPU time."""


def limited(work: Callable[[], Any], megabytes: int = 300, seconds: int = 30) -> Ended:
    """Runs `work` with so much more memory than is mapped now. Raises AssertionError where a limit kills it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (_data() + megabytes * 2**20,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            begun = time.process_time()
            try:
                answer = work()
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(writing, json.dumps([answer, time.process_time() - begun]).encode()[:60_000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    assert data, f"it was ended by {os.waitstatus_to_exitcode(status)}, or said too much"
    return Ended(*json.loads(data))


def _data() -> int:
    """Bytes of memory of its own that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
