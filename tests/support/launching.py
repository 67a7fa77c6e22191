"""A launcher as a process of its own, with tiny programs as its ranks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.failures import TerminationMessage
from support.runs import make_run_config, pod_environment

DRIVER = """
import ctypes, json, sys
from pathlib import Path
# What only PID 1 is otherwise: the new parent of orphans (PR_SET_CHILD_SUBREAPER).
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
from finetune_trainer.hangs import Deadlines
from finetune_trainer.launch import launch
from finetune_trainer.termination import run
pull, train, grace, cgroup, deadlines = sys.argv[1:]
limits = Deadlines(**json.loads(deadlines))
sys.exit(run(lambda config: launch(config, pull=(sys.executable, pull), train=(sys.executable, train),
                                   grace=float(grace), cgroup=Path(cgroup), deadlines=limits)))
"""
HEAD = """
import os, signal, sys, time
from pathlib import Path
rank, work = int(os.environ.get("RANK", -1)), Path(os.environ["FINETUNE_WORK_DIR"])
def done(name): (work / name).touch()
def await_file(name):
    while not (work / name).exists(): time.sleep(0.02)
def say(**message):
    from finetune_api.failures import TerminationMessage
    from finetune_trainer.outcome import write_outcome
    from finetune_trainer.workdir import WorkDir
    write_outcome(WorkDir.from_env().outcome(rank), TerminationMessage(**message))
"""


@dataclass
class Launch:
    process: subprocess.Popen[str]
    directory: Path
    output: str = ""

    def wait(self, timeout: float = 20.0) -> TerminationMessage:
        """The termination message, once the launcher has ended."""
        self.output, _ = self.process.communicate(timeout=timeout)
        text = (self.directory / "termination-log").read_bytes()
        assert len(text) <= 4096
        message = TerminationMessage.decode(text.decode())
        assert message is not None, text
        return message

    def until(self, condition: Callable[[], object], timeout: float = 15.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "the condition did not become true"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)

    def until_file(self, *names: str) -> None:
        self.until(lambda: all((self.directory / "work" / name).exists() for name in names))

    def pid(self, name: str) -> int:
        return int((self.directory / "work" / name).read_text())


@contextlib.contextmanager
def launched(
    directory: Path,
    rank: str,
    *,
    pull: str = "",
    grace: float = 1.0,
    grace_seconds: int = 20,
    processes: int = 2,
    workers: int = 1,
    env: dict[str, str] | None = None,
    deadlines: dict[str, float] | None = None,
    **spec: Any,
) -> Iterator[Launch]:
    """Runs a launcher whose ranks run the Python text `rank` (after HEAD)."""
    for name, text in (("pull.py", pull), ("rank.py", rank)):
        (directory / name).write_text(HEAD + text)
    config = make_run_config(workers=workers, processes=processes, grace_seconds=grace_seconds, **spec)
    variables = pod_environment(directory, config, **(env or {}))
    command = [sys.executable, "-c", DRIVER, str(directory / "pull.py"), str(directory / "rank.py")]
    process = subprocess.Popen(
        [*command, str(grace), str(directory / "cgroup"), json.dumps(deadlines or {})],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Launch(process, directory)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if process.stdout:
            process.stdout.close()


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
