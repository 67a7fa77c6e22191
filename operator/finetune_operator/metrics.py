"""Prometheus metrics of the operator: every label has a bounded set of values."""

import time
from collections.abc import Callable
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
)

from finetune_operator.containment import Where
from finetune_operator.jobmetrics import PREFIX, JobMetrics
from finetune_operator.settings import operator_version
from finetune_operator.sight import OTHER

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


WATCHED = ("FineTuneJob", "Job", "Pod")
REVIEWED = ("allowed", "denied", "failed")


class Vocabulary:
    """The first `limit` values of a label as they are, every later one as `other`: nothing floods the registry."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def word(self, value: object) -> str:
        text = str(value)
        if text not in self._known:
            if len(self._known) >= self._limit:
                return OTHER
            self._known.add(text)
        return text


class Metrics:
    """One registry and its instruments. Not thread-safe: it belongs to the event loop of the operator."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock`: seconds since the epoch."""
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        Info(PREFIX + "build", "Which operator this is.", registry=registry).info({"version": operator_version()})
        self._reconciles = Counter(PREFIX + "reconciles", "Reconciles by result.", ["result"], registry=registry)
        self._reconcile_seconds = Histogram(
            PREFIX + "reconcile_seconds", "Duration of a reconcile.", registry=registry, buckets=_SECONDS
        )
        self._errors = Counter(PREFIX + "reconcile_errors", "Failed reconciles by kind.", ["kind"], registry=registry)
        self.queue_depth = Gauge(PREFIX + "queue_depth", "Keys that wait for a reconcile.", registry=registry)
        """`set_function(lambda: len(queue))` reads it when it is scraped."""
        self.leader = Gauge(PREFIX + "leader", "1 where this operator acts, 0 where it stands by.", registry=registry)
        self._queue_seconds = Histogram(
            PREFIX + "queue_seconds", "How long a key waited for a worker.", registry=registry, buckets=_SECONDS
        )
        self.queue_adds = Counter(PREFIX + "queue_adds", "Keys put on the queue.", registry=registry)
        self.queue_retries = Counter(PREFIX + "queue_retries", "Keys put back after an error.", registry=registry)
        self._api_requests = Counter(
            PREFIX + "api_requests", "Requests to the API server.", ["verb", "resource", "code"], registry=registry
        )
        self._api_seconds = Histogram(
            PREFIX + "api_request_seconds",
            "Duration of a request to the API server.",
            ["verb"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.jobs = JobMetrics(registry, clock)
        self._internal = Counter(
            PREFIX + "internal_errors",
            "Errors of the operator about one object, by where.",
            ["where"],
            registry=registry,
        )
        for where in get_args(Where):
            self._internal.labels(where)
        self._reports = Counter(
            PREFIX + "progress_reports", "Progress reports by result.", ["result"], registry=registry
        )
        self._reviews = Counter(
            PREFIX + "admission_reviews", "Admission reviews by result.", ["result"], registry=registry
        )
        for result in REVIEWED:
            self._reviews.labels(result)
        self._connections = Counter(
            PREFIX + "connections",
            "Connections of the operator's own servers, by what became of them.",
            ["server", "result"],
            registry=registry,
        )
        self._failed_requests = Counter(
            PREFIX + "failed_requests",
            "Requests to the operator's own servers that ended in an error of the operator.",
            ["server"],
            registry=registry,
        )
        self._progress_writes = Counter(
            PREFIX + "progress_writes", "Writes of status.trainerStatus by result.", ["result"], registry=registry
        )
        self._events = Counter(PREFIX + "watch_events", "Events that watches told.", ["kind"], registry=registry)
        for kind in WATCHED:
            self._events.labels(kind)
        self.answered = Gauge(
            PREFIX + "api_answer_timestamp_seconds", "When the API server last answered.", registry=registry
        )
        self.looked = Gauge(
            PREFIX + "resync_timestamp_seconds", "When all jobs were last looked at.", registry=registry
        )
        self.resync_found = Counter(
            PREFIX + "resync_found", "Jobs with work that a look at all of them found.", registry=registry
        )
        self._clock = clock
        self._words = {name: Vocabulary(limit) for name, limit in _LIMITS.items()}

    def reconciled(self, seconds: float, error: BaseException | None = None) -> None:
        """One reconcile that took so long, and what it raised."""
        self._reconciles.labels("error" if error else "success").inc()
        self._reconcile_seconds.observe(seconds)
        if error:
            self._errors.labels(self._words["kind"].word(type(error).__name__)).inc()

    def internal_error(self, where: Where) -> None:
        """One error that was contained to its object."""
        self._internal.labels(where).inc()

    def api_call(self, verb: str, resource: str, code: int | str, seconds: float) -> None:
        """One request; `code` is the HTTP status, or a word such as `timeout` where there was no answer."""
        verb = self._words["verb"].word(verb)
        labels = verb, self._words["resource"].word(resource), self._words["code"].word(code)
        self._api_requests.labels(*labels).inc()
        self._api_seconds.labels(verb).observe(seconds)

    def waited(self, seconds: float) -> None:
        """A key that a worker has taken, and how long it was on the queue."""
        self._queue_seconds.observe(seconds)

    def watched(self, kind: str) -> None:
        """One event of a watch, of a kind in WATCHED."""
        self._events.labels(kind).inc()

    def looked_at_all(self) -> None:
        self.looked.set(self._clock())

    def answer(self) -> None:
        """The API server has answered, if only with a refusal."""
        self.answered.set(self._clock())

    def report(self, result: str) -> None:
        """One answered progress report: `accepted`, or the reason of its refusal."""
        self._reports.labels(self._words["result"].word(result)).inc()

    def review(self, result: str) -> None:
        """One admission review: `allowed`, `denied`, `failed`."""
        self._reviews.labels(result).inc()

    def connection(self, server: str, result: str) -> None:
        """One connection of a server of ours: `seated`, or `refused`, `evicted`, `late`."""
        self._connections.labels(server, result).inc()

    def request_failed(self, server: str) -> None:
        """One request that was answered with 500, or would have been."""
        self._failed_requests.labels(server).inc()

    def progress_write(self, result: str) -> None:
        """One try to write status.trainerStatus: `written`, `failed`, `dropped`."""
        self._progress_writes.labels(self._words["write"].word(result)).inc()


_LIMITS = {"kind": 32, "verb": 8, "resource": 16, "code": 32, "result": 16, "write": 8}
