"""Jobs with stages as pods run them: prepare, then attempts of real launchers over a real S3 protocol, on CPUs."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.failures import TerminationMessage
from finetune_api.run import RunConfig
from finetune_api.sizing import Sizing
from finetune_api.stages import effective
from support import warm
from support.gang import SHORT_ANSWERS
from support.runs import events_of, make_run_config, pod_environment
from support.s3 import S3

Row = dict[str, Any]


def jsonl(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass
class Attempt:
    """The pods of one attempt, each a launcher with a folder of its own."""

    directory: Path
    config: RunConfig
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def wait(self, timeout: float = 180.0) -> list[TerminationMessage]:
        """What each pod said at its end."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        finally:
            self.kill()
        found = [TerminationMessage.decode((pod / "termination-log").read_text()) for pod in self._pods()]
        assert all(found), self.log()
        return [message for message in found if message]

    def done(self) -> TerminationMessage:
        """The first pod's message of an attempt that must succeed."""
        messages = self.wait()
        assert all(message.reason is None for message in messages), f"{messages}\n{self.log()}"
        return messages[0]

    def until(self, condition: Callable[[], object], timeout: float = 90.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.log()
            assert all(process.poll() is None for process in self.processes), self.log()
            time.sleep(0.02)

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                # With its ranks, which are in groups of their own: they end when they see that it is gone.
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of one event in the first pod's log."""
        return events_of(self._pods()[0] / "log", name)

    def log(self) -> str:
        return "\n".join((pod / "log").read_text() for pod in self._pods())

    def _pods(self) -> list[Path]:
        return [self.directory / f"pod-{worker}" for worker in range(self.config.devices.workers)]


@dataclass
class StagedJob:
    directory: Path
    s3: S3
    config: RunConfig
    attempts: int = 0

    def prepare(self) -> TerminationMessage:
        place = self.directory / "prepare"
        place.mkdir(parents=True)
        env = pod_environment(place, self.config, **self.s3.environment, **warm.variables())
        command = [sys.executable, "-m", "finetune_trainer", "prepare"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        message = TerminationMessage.decode((place / "termination-log").read_text())
        assert message, done.stdout + done.stderr
        if message.prepared:
            self.config = self.config.model_copy(update={"prepared": message.prepared})
        return message

    def start(self, **environment: str) -> Attempt:
        """The next attempt, on pods with empty disks."""
        config = self.config.model_copy(update={"attempt": self.attempts})
        directory = self.directory / f"attempt-{self.attempts}"
        self.attempts += 1
        attempt = Attempt(directory, config)
        # Addresses of its own, as a pod has: on a shared one the next port may be anybody's.
        network = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
        for worker in range(config.devices.workers):
            pod = directory / f"pod-{worker}"
            pod.mkdir(parents=True)
            own = {
                "FINETUNE_ATTEMPT_UID": directory.name,
                "FINETUNE_WORKER_INDEX": str(worker),
                "FINETUNE_POD_IP": f"{network}.{worker + 1}",
                "FINETUNE_MASTER_ADDR": f"{network}.1",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            env = pod_environment(pod, config, **self.s3.environment, **warm.variables(), **own, **environment)
            with (pod / "log").open("wb") as log:
                command = [sys.executable, "-m", "finetune_trainer", "train"]
                attempt.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        return attempt

    def run(self) -> TerminationMessage:
        return self.start().done()

    def keys(self, prefix: str) -> list[str]:
        """Of the objects below a prefix of the scratch prefix, without it."""
        bucket, _, scratch = self.config.scratch_uri.removeprefix("s3://").partition("/")
        return [key.removeprefix(scratch) for key in self.s3.keys(bucket, scratch + prefix)]

    def download(self, uri: str, directory: Path) -> Path:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for key in self.s3.keys(bucket, prefix):
            path = directory / key.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.s3.get(f"s3://{bucket}/{key}"))
        return directory


def make_staged_job(
    directory: Path,
    s3: S3,
    name: str,
    stages: list[Row],
    *,
    workers: int = 1,
    strategy: str = "DDP",
    micro_batch: int = 8,
    **spec: Any,
) -> StagedJob:
    """16 examples a step, 8 steps a stage unless it says otherwise; the model is at `s3://bucket/models/tiny/`."""
    fields: dict[str, Any] = {
        "tuning": {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}},
        "training": {
            "globalBatchSize": 16,
            "maxSteps": 8,
            "learningRate": 0.02,
            "maxLength": 64,
            "schedule": "Constant",
        },
        "validation": {"fraction": 0.2},
        "output": {"uri": f"s3://bucket/{name}/"},
        "checkpoint": {"interval": {"type": "Steps", "steps": 1000}},
        "dataPolicy": {"similarity": 1},
        "evaluation": SHORT_ANSWERS,
        "stages": stages,
    } | spec
    # Of one that has ended well, too, tests look at what it saved.
    fields["checkpoint"] = {"whenComplete": "Retain"} | fields["checkpoint"]
    config = make_run_config(workers=workers, endpoint=s3.endpoint, **fields)
    sizings = [
        Sizing.model_validate(
            {
                "strategy": strategy,
                "microBatchSize": micro_batch,
                "gradientAccumulation": stage.spec.training.global_batch_size // (workers * micro_batch),
                "memoryPerGPU": 1,
            }
        )
        for stage in effective(config.spec)
    ]
    update = {"sizing": sizings[0], "stage_sizings": sizings if stages else []}
    directory.mkdir(parents=True, exist_ok=True)
    return StagedJob(directory, s3, config.model_copy(update=update))
