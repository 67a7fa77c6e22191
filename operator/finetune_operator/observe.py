"""PURE. Jobs and pods as the API server sends them -> the few facts that decisions are made of.

Tenants may write Jobs and pods of their namespace. So a Job counts only by its UID, if the FineTuneJob's status has
that, and what it was made for is read from there: its labels and annotations decide nothing.
"""

import datetime
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from finetune_api.bounds import parse_time
from finetune_api.failures import TerminationMessage
from finetune_api.jobstatus import FineTuneJobStatus
from finetune_operator.kueue import Queue
from finetune_operator.manifests import CONTAINER, JOB_LABEL, child_name

Object = Mapping[str, Any]
EXPLAINED_AFTER = datetime.timedelta(seconds=10)
"""How long the pods of a Job that has ended are waited for: then they are gone, and with them what they said."""


@dataclass(frozen=True)
class ContainerEnd:
    """How the trainer's container ended."""

    exit_code: int
    oom_killed: bool
    finished: datetime.datetime | None
    text: str
    """The termination message as it was left."""

    @property
    def message(self) -> TerminationMessage | None:
        return TerminationMessage.decode(self.text) if self.text else None


@dataclass(frozen=True)
class Pod:
    name: str
    owner: str
    """UID of its Job."""
    index: int | None
    """The worker that it is."""
    phase: str
    created: datetime.datetime
    deletion: datetime.datetime | None
    """When its grace is over, where it is being deleted."""
    node: str | None
    started: datetime.datetime | None
    """When its container began to run."""
    end: ContainerEnd | None
    waiting: tuple[str, str] | None
    """Reason and message of a container that cannot start."""
    unschedulable: str | None
    """The scheduler's message."""
    disruption: tuple[str, str] | None
    """Reason and message of its DisruptionTarget condition."""
    evicted: str | None
    """The kubelet's message where it used more of its node than it may."""
    bound: datetime.datetime | None = None
    """When it was given its node."""

    @property
    def over(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel killed it for its memory. Some runtimes say so too where only a helper process was killed
        and the program itself ended well."""
        return self.end is not None and self.end.oom_killed and self.end.exit_code != 0

    @property
    def running(self) -> bool:
        return self.phase == "Running" and self.started is not None and self.end is None and self.deletion is None


@dataclass(frozen=True)
class Child:
    """A batch/v1 Job of a FineTuneJob."""

    name: str
    uid: str
    attempt: int | None
    """None: `prepare`."""
    created: datetime.datetime
    workers: int
    suspended: bool
    deleting: bool
    finished: Literal["Complete", "Failed"] | None
    finished_at: datetime.datetime | None
    message: str
    """Of the condition that finished it."""
    queue: str | None = None
    """The one that it was handed to, which admits it."""
    selective: bool = False
    """Its pods refuse some nodes."""


@dataclass(frozen=True)
class Observed:
    """Everything there is of one FineTuneJob, read live."""

    jobs: tuple[Child, ...] = ()
    """Those that the status tells of."""
    pods: tuple[Pod, ...] = ()
    queue: Queue | None = None
    """What the queue says of the gang that is in one; None: it was not asked."""
    strays: tuple[Child, ...] = ()
    """Jobs under a name of ours that the status knows nothing of: made by somebody else for this FineTuneJob, or by an
    operator that ended before it could write their UID down."""

    @property
    def prepare(self) -> Child | None:
        return next((job for job in self.jobs if job.attempt is None), None)

    @property
    def gangs(self) -> tuple[Child, ...]:
        return tuple(job for job in self.jobs if job.attempt is not None)

    @property
    def queued(self) -> Child | None:
        """The gang that is a queue's to admit, and is not over."""
        return next((job for job in self.gangs if job.queue and not (job.finished or job.deleting)), None)

    @property
    def prepared_by(self) -> Pod | None:
        """The pod that speaks for a `prepare` that succeeded."""
        child = self.prepare
        if child is None or child.finished != "Complete":
            return None
        return next((p for p in self.pods_of(child.uid) if p.index == 0 and p.phase == "Succeeded"), None)

    def unexplained(self, recorded: Container[int | None], now: datetime.datetime) -> Child | None:
        """A Job that has just ended, though no pod of it has: whoever listed them was told of an earlier time."""
        for child in self.jobs:
            since = now - child.finished_at if child.finished_at else EXPLAINED_AFTER
            ended = any(pod.over for pod in self.pods_of(child.uid))
            if child.attempt not in recorded and not ended and abs(since) < EXPLAINED_AFTER:
                return child
        return None

    def pods_of(self, uid: str | None) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.owner == uid)


class Census:
    """Everything of ours that is in a cluster, for many FineTuneJobs at once."""

    def __init__(self) -> None:
        self._jobs: dict[str, list[Child]] = {}
        self._uids: set[str] = set()
        self._pods: dict[tuple[str, str], list[Pod]] = {}

    def add_job(self, raw: Object) -> None:
        if owner := controller_uid(raw):
            child = read_job(raw)
            self._uids.add(child.uid)
            self._jobs.setdefault(owner, []).append(child)

    def add_pod(self, raw: Object) -> None:
        """A pod; call it after all Jobs. One that belongs to none of them is not kept."""
        meta = raw["metadata"]
        if controller_uid(raw) not in self._uids:
            return
        self._pods.setdefault((meta["namespace"], meta["labels"][JOB_LABEL]), []).append(read_pod(raw))

    def runs(self, uid: str) -> bool:
        """Whether a Job of this FineTuneJob is not over."""
        return any(job.finished is None for job in self._jobs.get(uid, ()))

    def of(self, uid: str, namespace: str, name: str, status: FineTuneJobStatus) -> Observed:
        return _observed(name, status, self._jobs.get(uid, ()), self._pods.get((namespace, name), ()))


def observe(uid: str, name: str, status: FineTuneJobStatus, jobs: Iterable[Object], pods: Iterable[Object]) -> Observed:
    """What belongs to the FineTuneJob of this UID. Jobs of an earlier one of the same name are not its own."""
    own = [read_job(raw) for raw in jobs if controller_uid(raw) == uid]
    return _observed(name, status, own, [read_pod(raw) for raw in pods])


def _observed(name: str, status: FineTuneJobStatus, jobs: Iterable[Child], pods: Iterable[Pod]) -> Observed:
    attempts = {attempt.uid: attempt for attempt in status.attempts if attempt.uid}
    prepare = status.prepare.uid if status.prepare else None
    ours = set(expected_names(name, status))
    known: list[Child] = []
    strays: list[Child] = []
    for job in jobs:
        if attempt := attempts.get(job.uid):
            selective = bool(attempt.avoids_nodes)
            known.append(replace(job, attempt=attempt.number, queue=attempt.queue, selective=selective))
        elif job.uid == prepare:
            known.append(job)
        elif job.name in ours:
            strays.append(job)
    return Observed(
        tuple(sorted(known, key=lambda job: -1 if job.attempt is None else job.attempt)),
        tuple(sorted(pods, key=lambda pod: (pod.index or 0, pod.name))),
        strays=tuple(strays),
    )


def expected_names(name: str, status: FineTuneJobStatus) -> list[str]:
    """Names of all Jobs that there are or may be next: `prepare`, the attempts, and the one that would follow."""
    numbers = [attempt.number for attempt in status.attempts]
    return [child_name(name, number) for number in (None, *numbers, numbers[-1] + 1 if numbers else 0)]


def controller_uid(raw: Object) -> str | None:
    owners = raw["metadata"].get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)


def read_job(raw: Object) -> Child:
    meta, spec, status = raw["metadata"], raw["spec"], raw.get("status") or {}
    complete, failed = _condition(status, "Complete"), _condition(status, "Failed")
    ended = complete or failed
    return Child(
        name=meta["name"],
        uid=meta["uid"],
        attempt=None,
        created=parse_time(meta["creationTimestamp"]),
        workers=spec.get("completions", 1),
        suspended=bool(spec.get("suspend")),
        deleting="deletionTimestamp" in meta,
        finished="Complete" if complete else "Failed" if failed else None,
        finished_at=parse_time(ended["lastTransitionTime"]) if ended and ended.get("lastTransitionTime") else None,
        message=(ended or {}).get("message") or "",
    )


def read_pod(raw: Object) -> Pod:
    meta, status = raw["metadata"], raw.get("status") or {}
    container: Object = next((c for c in status.get("containerStatuses") or () if c["name"] == CONTAINER), {})
    state = container.get("state") or {}
    running, ended, waiting = state.get("running"), state.get("terminated"), state.get("waiting")
    started = (running or ended or {}).get("startedAt")
    scheduled: Object = next((c for c in status.get("conditions") or () if c["type"] == "PodScheduled"), {})
    disrupted = _condition(status, "DisruptionTarget")
    index = (meta.get("annotations") or {}).get("batch.kubernetes.io/job-completion-index")
    refused = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
    bound = scheduled.get("lastTransitionTime") if scheduled.get("status") == "True" else None
    return Pod(
        name=meta["name"],
        owner=controller_uid(raw) or "",
        index=_count(index),
        phase=status.get("phase", "Pending"),
        created=parse_time(meta["creationTimestamp"]),
        deletion=parse_time(meta["deletionTimestamp"]) if "deletionTimestamp" in meta else None,
        node=(raw.get("spec") or {}).get("nodeName"),
        started=parse_time(started) if started else None,
        end=_end(ended) if ended else None,
        waiting=(waiting["reason"], waiting.get("message") or "") if waiting and waiting.get("reason") else None,
        unschedulable=scheduled.get("message") or "no node has room for the pod" if refused else None,
        disruption=(disrupted.get("reason") or "", disrupted.get("message") or "") if disrupted else None,
        bound=parse_time(bound) if bound else None,
        evicted=(status.get("message") or "evicted by its node") if status.get("reason") == "Evicted" else None,
    )


def _end(terminated: Object) -> ContainerEnd:
    finished = terminated.get("finishedAt")
    return ContainerEnd(
        exit_code=terminated.get("exitCode", 0),
        oom_killed=terminated.get("reason") == "OOMKilled",
        finished=parse_time(finished) if finished else None,
        text=terminated.get("message") or "",
    )


def _condition(status: Object, kind: str) -> Object | None:
    return next((c for c in status.get("conditions") or () if c["type"] == kind and c["status"] == "True"), None)


def _count(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else None
