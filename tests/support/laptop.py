"""A whole laptop for end-to-end tests: sandbox (or real control plane), operator, S3, a tiny model and data in it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_cli import cluster as clusters
from finetune_cli import laptop
from finetune_cli.cluster import PROFILES, Target
from finetune_cli.objectstore import Location, Store
from finetune_sandbox.up import SandboxInfo
from support import warm
from support.tiny import make_tiny_model

BUCKET = laptop.BUCKET
TEXT = "apple river stone cloud window garden paper silver morning engine letter yellow market summer bridge"
WORDS = TEXT.split()


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Laptop:
    directory: Path
    info: SandboxInfo
    store: Store

    def finetune(self, *words: str, timeout: float = 200.0) -> Ran:
        """The command line, as a user runs it."""
        done = subprocess.run(
            [sys.executable, "-m", "finetune_cli", *words],
            env=os.environ | {"KUBECONFIG": self.info.kubeconfig, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    def manifest(self, name: str, **spec: Any) -> Path:
        """A FineTuneJob over the tiny model and data; keyword arguments replace members of spec."""
        job = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "baseModel": {"uri": f"s3://{BUCKET}/models/tiny/"},
                "datasets": [{"name": "facts", "uri": f"s3://{BUCKET}/data/facts.jsonl"}],
                "validation": {"fraction": 0.1},
                "tuning": {"type": "LoRA", "lora": {"rank": 4, "alpha": 8}},
                "training": {"maxSteps": 30, "learningRate": 0.01, "globalBatchSize": 8, "maxLength": 128},
                "output": {"uri": f"s3://{BUCKET}/adapters/"},
                "credentials": {"secretRef": {"name": laptop.SECRET}},
                **spec,
            },
        }
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(job, sort_keys=False))
        return path

    def job(self, name: str) -> dict[str, Any]:
        """The FineTuneJob as the API server has it."""
        ran = self.finetune("get", name, "-o", "json")
        assert ran.code == 0, ran.err
        found: dict[str, Any] = json.loads(ran.out)
        return found

    def keys(self, prefix: str = "") -> dict[str, str]:
        """Key -> ETag of every object below a prefix of the bucket."""
        return {o["Key"]: o["ETag"] for o in self.store.objects(Location.parse(f"s3://{BUCKET}/{prefix}"))}

    def put(self, path: Path, key: str) -> None:
        self.store.upload(path, Location.parse(f"s3://{BUCKET}/{key}"))


def write_facts(path: Path, count: int = 240) -> Path:
    """Prompt and completion with a pattern that a tiny model can learn."""
    rows = []
    for i in range(count):
        word, other = WORDS[i % len(WORDS)], WORDS[(i * 7 + i // len(WORDS)) % len(WORDS)]
        rows.append({"prompt": f"Number {i}: repeat {word} {other}.", "completion": f" {word} {other} {word}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def started(directory: Path, **resources: str) -> Iterator[SandboxInfo]:
    """A laptop whose pods start with the trainer imported: on two cores that would be most of their work.

    `resources` replace what its profile asks for a worker and for `prepare`.
    """
    info = laptop.start(directory / "sandbox")
    try:
        profile = laptop.profile(info)
        spec = profile["spec"]
        spec["environment"] = [{"name": name, "value": value} for name, value in warm.variables().items()]
        spec["resources"] |= resources
        spec["prepare"] |= resources
        clusters.run(Target(info.kubeconfig), lambda cluster: cluster.apply(PROFILES, profile))
        yield info
    finally:
        laptop.stop(directory / "sandbox")


@contextmanager
def running_laptop(directory: Path) -> Iterator[Laptop]:
    """With a tiny model and data in it."""
    with started(directory) as info:
        found = Laptop(directory, info, laptop.store(info))
        model = make_tiny_model(directory / "tiny", vocab_text=" ".join(WORDS) + " Number repeat 0123456789:.\n")
        for path in model.iterdir():
            found.put(path, f"models/tiny/{path.name}")
        found.put(write_facts(directory / "facts.jsonl"), "data/facts.jsonl")
        yield found
