"""What Prometheus scrapes, for jobs that a test tells of: no API server is asked."""

import datetime
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry

from finetune_api.budget import Account
from finetune_operator.jobmetrics import JobMetrics
from finetune_operator.ledger import Ledger
from finetune_operator.metrics import Metrics
from support.manifests import job_manifest
from support.world import START, Object, rfc3339

BORN = START.timestamp()


def at(seconds: float) -> str:
    return rfc3339(START + datetime.timedelta(seconds=seconds))


@dataclass
class Board:
    """Jobs that are told of, and what is scraped then. Time goes as the test says."""

    namespaces: int = 200
    jobs: int = 1000
    jobs_of_namespace: int = 100
    now: float = 0.0
    versions: int = 0
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        ledger = Ledger(BORN, self.namespaces, self.jobs, self.jobs_of_namespace)
        self.metrics = JobMetrics(self.registry, lambda: BORN + self.now, ledger)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"finetune_operator_{name}", labels or None)

    def series(self, prefix: str = "") -> int:
        """Of which metrics whose name begins so."""
        samples = [sample for family in self.registry.collect() for sample in family.samples]
        return sum(sample.name.startswith(f"finetune_operator_{prefix}") for sample in samples)

    def tell(self, job: "Told", state: str | None, version: int | None = None, **status: Any) -> None:
        self.versions += 1
        self.metrics.note(job.raw(state, version or self.versions, status))


@dataclass
class Told:
    name: str = "bot"
    namespace: str = "team-a"
    created: float = 0.0
    workers: int = 2
    uid: str = ""

    def raw(self, state: str | None, version: int, status: Object) -> Object:
        raw = job_manifest(self.name, self.namespace)
        raw["metadata"] |= {
            "uid": self.uid or f"{self.namespace}/{self.name}",
            "resourceVersion": str(version),
            "creationTimestamp": at(self.created),
        }
        raw["spec"]["distribution"] = {"workers": self.workers, "gpusPerWorker": 4}
        raw["status"] = {"state": state, **status} if state else {}
        return raw


def run(number: int = 0, started: float | None = None, ended: float | None = None, **more: Any) -> Object:
    times = {"creationTime": at(0), "startTime": started, "completionTime": ended}
    told = {
        key: at(value) if isinstance(value, float | int) else value for key, value in times.items() if value is not None
    }
    return {"number": number, "job": f"bot-{number}", "uid": f"uid-{number}", "workers": 2, **told, **more}


def failed(reason: str) -> list[Object]:
    return [{"type": "Failed", "status": "True", "reason": reason, "message": "", "lastTransitionTime": at(0)}]


def trainer(step: int | None = None, attempt: int = 0, **more: Any) -> Object:
    metrics = [{"name": name, "value": value} for name, value in more.pop("metrics", {}).items()]
    told = {"attempt": attempt, "phase": "Training", "metrics": metrics, "lastUpdatedTime": at(0), **more}
    return told | ({"step": step, "totalSteps": 100} if step is not None else {})


LIFE: tuple[tuple[str | None, Object], ...] = (
    (None, {}),
    ("Preparing", {"startTime": at(1)}),
    ("Queued", {"attempts": [run()]}),
    ("Starting", {"attempts": [run()]}),
    ("Running", {"attempts": [run(started=60)]}),
)
"""How a job begins."""


def lives(namespace: str, name: str, *, since: float = 0.0, count: Iterator[int] | None = None) -> Iterator[Object]:
    """The versions of a job that is queued, runs and reports, the last one with its second report."""
    job, numbers = Told(name, namespace, created=since), count or itertools.count(1)
    for state, status in LIFE:
        yield job.raw(state, next(numbers), status)
    for step in (1, 50):
        metrics = {"loss": str(2 - step / 100), "tokens_per_second": "3000"}
        told = trainer(step, progressPercentage=step, estimatedRemainingSeconds=100 - step, metrics=metrics)
        checkpoint = {"uri": "s3://b/k", "step": step, "time": at(60)}
        status = {"attempts": [run(started=60)], "trainerStatus": told, "checkpoint": checkpoint}
        yield job.raw("Running", next(numbers), status)


def everything(metrics: Metrics) -> None:
    """Something of each that there is to tell."""
    for raw in lives("team-a", "bot"):
        metrics.jobs.note(raw)
    metrics.jobs.note(Told("bad").raw("Running", 1, {"attempts": [run(started=60)]}))
    why = failed("OutOfMemory")
    lost = run(started=60, ended=90, outcome="Retryable", reason="NodeLost")
    metrics.jobs.note(Told("bad").raw("Failed", 2, {"attempts": [lost], "conditions": why, "completionTime": at(99)}))
    metrics.jobs.accounts = lambda: [("p", "team-a", Account(100.0, 50.0, 10.0, START))]
    metrics.leader.set(1)
    metrics.reconciled(0.02)
    metrics.reconciled(0.2, TimeoutError())
    metrics.api_call("GET", "finetunejobs", 200, 0.01)
    metrics.api_call("POST", "jobs", 403, 0.01)
    metrics.waited(0.1)
    metrics.watched("FineTuneJob")
    metrics.answer()
    metrics.looked_at_all()
    metrics.report("accepted")
    metrics.progress_write("written")
    metrics.review("allowed")
    metrics.connection("webhook", "seated")
    metrics.request_failed("webhook")
