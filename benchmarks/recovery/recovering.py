"""From kill -9 of a rank to the next optimizer step, and the steps that are lost: ours, and torchrun's restarts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from support.pods import Job
from support.runs import pod_environment
from support.s3 import S3, unused_port

HERE = Path(__file__).resolve().parent
STEPS, EVERY, KILLED = 4000, 10, 57
"""Steps in all, steps between checkpoints, and the step after which rank 1 is killed."""


class Recovery(NamedTuple):
    seconds: float
    lost: int


class Step(NamedTuple):
    number: int
    time: float
    pid: int


def ours(directory: Path, s3: S3, model: Path) -> Recovery:
    """A pod that is struck, and the next one, as soon as the first has ended; both from nothing."""
    job = Job.make(
        directory,
        s3,
        model,
        directory.name,
        {},
        training={"maxSteps": STEPS, "learningRate": 0.005},
        checkpoint={"interval": {"type": "Steps", "steps": EVERY}, "keep": 2},
    )
    first = _Pod(job, 0)
    _until(lambda: first.step >= KILLED, 120)
    at, killed = first.step, time.time()
    os.kill(first.pid(1), signal.SIGKILL)
    first.process.wait(60)
    second = _Pod(job, 1)
    _until(lambda: second.step > 0, 120)
    seconds = time.time() - killed
    resumed = next(line["step"] for line in second.lines() if line["event"] == "checkpoint found")
    second.process.kill()
    second.process.wait()
    return Recovery(seconds, at - resumed)


class _Pod:
    def __init__(self, job: Job, number: int) -> None:
        self.directory = job.gang.directory / f"pod-{number}"
        self.directory.mkdir()
        config = job.gang.config.model_copy(update={"attempt": number})
        uid, port = f"attempt-{number}", str(unused_port())
        env = pod_environment(self.directory, config, FINETUNE_ATTEMPT_UID=uid, FINETUNE_MASTER_PORT=port)
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetune_trainer", "train"],
                env=env | dict(job.environment),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def beat(self, rank: int) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.directory / "work" / "heartbeats" / f"rank-{rank}").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    @property
    def step(self) -> int:
        """The last that rank 0 finished in this pod."""
        return int(self.beat(0).get("step") or 0)

    def pid(self, rank: int) -> int:
        return int(self.beat(rank)["pid"])

    def lines(self) -> list[dict[str, Any]]:
        text = (self.directory / "log").read_text(errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]


def plain(directory: Path, model: Path) -> Recovery:
    directory.mkdir(parents=True)
    log = directory / "log"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3"]
    arguments = [str(HERE / "plain.py"), str(model), str(directory / "out"), str(STEPS), str(EVERY)]
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command, *arguments],
            env=os.environ | quiet,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _until(lambda: len(_steps(log, 1)) >= KILLED, 120)
        before = _steps(log, 1)[-1]
        killed = time.time()
        os.kill(before.pid, signal.SIGKILL)
        _until(lambda: any(step.pid != before.pid for step in _steps(log, 1)), 180)
        after = next(step for step in _steps(log, 1) if step.pid != before.pid)
    finally:
        process.terminate()
        process.wait()
    return Recovery(after.time - killed, before.number - (after.number - 1))


def _steps(log: Path, rank: int) -> list[Step]:
    found = re.findall(r"step (\d+) ([\d.]+) (\d+) (\d+)", log.read_text(errors="replace"))
    return [Step(int(number), float(at), int(pid)) for number, at, pid, own in found if int(own) == rank]


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not become true")
        time.sleep(0.005)
