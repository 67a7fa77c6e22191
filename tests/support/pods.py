"""A job's pods with everything that runs in them, launcher, download and ranks, one attempt after the other.

What `prepare` leaves lies in S3. A process may be stopped where it enters a phase, so that a signal reaches it there.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file

from finetune_api.failures import Reason, TerminationMessage, outcome_of
from finetune_api.run import PinnedObject
from finetune_trainer import heartbeat
from finetune_trainer.publish import fetch_verified
from finetune_trainer.storage import Store
from finetune_trainer.underway import at_work
from finetune_trainer.workdir import WorkDir
from support import warm
from support.gang import Gang, make_gang
from support.runs import pod_environment
from support.s3 import S3, unused_port

DRIVER = """
import json, sys
from finetune_trainer.hangs import Deadlines
from finetune_trainer.launch import launch
from finetune_trainer.termination import run
limits = Deadlines(**json.loads(sys.argv[1]))
sys.exit(run(lambda config: launch(config, grace=5.0, deadlines=limits)))
"""
PHASES = ("Pulling", "Loading", "Evaluating", "Training", "Step", "Saving", "Publishing")
"""`Training`: before the first step; `Step`: after the fifth."""
SECONDS = 8.0
"""Deadline of the phase in which something is stopped; others keep theirs, since a busy machine is slow."""
DEADLINES = {
    "Pulling": {"pulling": SECONDS},
    "Loading": {"loading": SECONDS},
    "Evaluating": {"evaluating": SECONDS},
    "Training": {"first_step": SECONDS},
    "Step": {"step_least": SECONDS, "step_factor": 5.0},
    "Saving": {"saving": SECONDS},
    "Publishing": {"publishing": SECONDS},
}
MAX_ATTEMPTS = 5


class Blow(NamedTuple):
    """A signal to one process in one phase."""

    phase: str
    number: signal.Signals
    rank: int

    @property
    def process(self) -> str:
        return "pull" if self.phase == "Pulling" else f"rank-{self.rank}"

    def __str__(self) -> str:
        return f"{self.number.name} to {self.process} in {self.phase}"


class Ended(NamedTuple):
    message: TerminationMessage
    output: str


@dataclass
class Job:
    gang: Gang
    environment: Mapping[str, str]
    attempts: list[Ended] = field(default_factory=list)

    @classmethod
    def make(
        cls, directory: Path, s3: S3, model: Path, prefix: str, start: Mapping[str, str] | None = None, **spec: Any
    ) -> Self:
        """One pod of two ranks; 12 steps, a checkpoint after every third. `start`: support.warm's, if not given."""
        chosen: dict[str, Any] = {
            "training": {"maxSteps": 12, "learningRate": 0.005},
            "tuning": {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}},
            "checkpoint": {"interval": {"type": "Steps", "steps": 3}, "keep": 2, "whenComplete": "Delete"},
        }
        gang = make_gang(
            directory, s3, model, bucket_prefix=prefix, workers=1, processes=2, micro_batch=8, **(chosen | spec)
        )
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        start = warm.variables() if start is None else start
        return cls(gang, {**start, **s3.environment, **quiet}).upload()

    def upload(self) -> Self:
        s3, config = self.gang.s3, self.gang.config
        base = [self._put(path, f"s3://bucket/models/tiny/{path.name}") for path in sorted(self.gang.model.iterdir())]
        index = self.gang._index().model_copy(update={"base_model": base})
        assert config.prepared
        folder = config.prepared.index_uri.rpartition("/")[0]
        for shard in index.shards:
            self._put(self.gang.directory / "shards" / shard.key, f"{folder}/{shard.key}")
        data = index.model_dump_json(by_alias=True, exclude_none=True).encode()
        s3.put(config.prepared.index_uri, data)
        s3.put(config.prepared.report_uri, b"{}")
        prepared = config.prepared.model_copy(update={"index_sha256": hashlib.sha256(data).hexdigest()})
        self.gang.config = config.model_copy(update={"prepared": prepared})
        return self

    def _put(self, path: Path, uri: str) -> PinnedObject:
        self.gang.s3.put(uri, path.read_bytes())
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        found = self.gang.s3.client().head_object(Bucket=bucket, Key=key)
        return PinnedObject(uri=uri, size=found["ContentLength"], etag=found["ETag"])

    def attempt(self, blow: Blow | None = None) -> Ended:
        """One pod on an empty disk, to its end."""
        number = len(self.attempts)
        directory = self.gang.directory / f"attempt-{number}"
        directory.mkdir()
        config = self.gang.config.model_copy(update={"attempt": number})
        pause = {"WARM_PAUSE": f"{blow.process} {blow.phase} {directory}"} if blow else {}
        env = pod_environment(
            directory,
            config,
            FINETUNE_ATTEMPT_UID=f"attempt-{number}",
            FINETUNE_MASTER_PORT=str(unused_port()),
            **self.environment,
            **pause,
        )
        limits = DEADLINES[blow.phase] if blow and blow.number == signal.SIGSTOP else {}
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, json.dumps(limits)], env=env, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                if blow:
                    strike(blow, directory, process)
                process.wait(120)
            finally:
                process.kill()
                process.wait()
        work = WorkDir(directory / "work")
        while at_work(work):  # its container has ended: in a pod nothing would be left
            time.sleep(0.02)
        message = TerminationMessage.decode((directory / "termination-log").read_text())
        assert message, log.read_text()
        shutil.rmtree(work.root)
        self.attempts.append(Ended(message, log.read_text(errors="replace")))
        return self.attempts[-1]

    def run(self, blow: Blow | None = None) -> str:
        """Until it has succeeded, as the operator would; what is wrong, or nothing."""
        for _ in range(MAX_ATTEMPTS):
            reason = self.attempt(blow).message.reason
            blow = None
            if reason is None:
                return ""
            if outcome_of(reason) == "Permanent":
                break
        told = [f"{ended.message.reason}: {ended.message.message}" for ended in self.attempts]
        return f"it did not succeed: {'; '.join(told)}"

    @property
    def published(self) -> list[str]:
        """The URIs of manifests below the output."""
        prefix = self.gang.config.output_uri.removeprefix("s3://bucket/")
        return [f"s3://bucket/{key}" for key in self.gang.s3.keys("bucket", prefix) if key.endswith("/manifest.json")]

    def adapter(self) -> dict[str, torch.Tensor]:
        """What was published, every byte verified."""
        (manifest,) = self.published
        directory = self.gang.directory / "published"
        fetch_verified(Store(self.gang.config.storage), manifest, directory)
        found: dict[str, torch.Tensor] = load_file(directory / "adapter_model.safetensors")
        return found

    def scratch(self) -> set[str]:
        """What lies in the job's scratch prefix, as keys below it; without the registers."""
        prefix = self.gang.config.scratch_uri.removeprefix("s3://bucket/")
        keys = (key.removeprefix(prefix) for key in self.gang.s3.keys("bucket", prefix))
        return {key for key in keys if not key.startswith("fence/")}

    def open_uploads(self) -> list[str]:
        found = self.gang.s3.client().list_multipart_uploads(Bucket="bucket").get("Uploads", [])
        return [upload["Key"] for upload in found if upload["Key"].startswith(self.gang.config.output_uri[12:])]


def strike(blow: Blow, directory: Path, launcher: "subprocess.Popen[bytes]") -> None:
    """Sends the signal once the process stands in its phase, and lets it go on."""
    reached = directory / "reached"
    deadline = time.monotonic() + 60
    while not reached.exists():
        log = (directory / "log").read_text(errors="replace")
        assert launcher.poll() is None, f"{blow.process} never came to {blow.phase}:\n{log}"
        assert time.monotonic() < deadline, f"{blow.process} did not come to {blow.phase}:\n{log}"
        time.sleep(0.005)
    beat = heartbeat.read(WorkDir(directory / "work").heartbeat(blow.process))
    assert beat
    os.kill(beat.pid, blow.number)
    (directory / "go").touch()


def expected(blow: Blow) -> set[Reason | None]:
    """How the attempt ends that was struck; None: well."""
    if blow.number == signal.SIGSTOP:
        return {Reason.HUNG}
    if blow.number == signal.SIGKILL or blow.phase == "Pulling":
        return {Reason.RANK_FAILED}
    # What is all but done is finished.
    return {None} if blow.phase == "Publishing" else {Reason.PREEMPTED}
