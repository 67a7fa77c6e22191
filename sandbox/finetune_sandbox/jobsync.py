"""The Job controller's decision as one pure function: `sync(job, pods, now) -> Plan`, for Indexed Jobs.

It follows `syncJob`, `manageJob` and `trackJobStatusAndRemoveFinalizers` of Kubernetes' job_controller.go (1.36): a pod
is counted in the Job's status before its finalizer goes, so that one that is deleted is never counted twice or not at
all; a Job gets FailureTarget or SuccessCriteriaMet first, and Failed or Complete only when all of its pods have ended.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from finetune_sandbox.jobpods import FINALIZER, completion_index, format_indexes, make_pod, parse_indexes
from finetune_sandbox.podpolicy import match
from finetune_sandbox.podstatus import TERMINAL, timestamp

Object = Mapping[str, Any]

CONTROLLER = "kubernetes.io/job-controller"
_BACKOFF_SECONDS, _BACKOFF_MAX_SECONDS = 10.0, 600.0


@dataclass(frozen=True)
class Notice:
    """An Event about the Job."""

    type: str
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """In the order to be carried out. `status` is None where nothing changed; `release`: pods whose finalizer goes."""

    status: dict[str, Any] | None = None
    release: tuple[Object, ...] = ()
    delete: tuple[Object, ...] = ()
    create: tuple[dict[str, Any], ...] = ()
    notices: tuple[Notice, ...] = ()
    delete_job: bool = False
    requeue_after: float | None = None


@dataclass
class _Step:
    """What one sync gathers."""

    status: dict[str, Any]
    release: list[Object] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)
    create: list[dict[str, Any]] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    requeue_after: float | None = None


def sync(job: Object, pods: Sequence[Object], now: datetime) -> Plan:
    """What to do for `job` now. `pods` are all pods that it controls."""
    tracked = tuple(pod for pod in pods if FINALIZER in (pod["metadata"].get("finalizers") or []))
    status: dict[str, Any] = copy.deepcopy(dict(job.get("status") or {}))
    if job["metadata"].get("deletionTimestamp"):
        return Plan(release=tracked)
    if ended := _condition(status, "Complete") or _condition(status, "Failed"):
        return _after_end(job, ended, tracked, now)
    if problem := unsupported(job["spec"]):
        return Plan(notices=(Notice("Warning", "Unsupported", problem),))

    step = _Step(status)
    suspended = bool(job["spec"].get("suspend"))
    if "startTime" not in status and not suspended:
        status["startTime"] = timestamp(now)
    active = [pod for pod in pods if not _terminal(pod) and not _terminating(pod)]
    terminating = [pod for pod in pods if not _terminal(pod) and _terminating(pod)]
    completed, failed = _count(job, tracked, step)
    target = _condition(status, "FailureTarget") or _condition(status, "SuccessCriteriaMet")
    decided_before = target is not None
    if target is None:
        target = _failure(job, tracked, failed, now, step)
        if target is None and len(completed) >= _completions(job) and not active:
            message = "Reached expected number of succeeded pods"
            target = _new("SuccessCriteriaMet", "True", "CompletionsReached", message, now)
        if target:
            status.setdefault("conditions", []).append(target)
    if target:
        _abandon(job, tracked, target, step)
        step.delete = active
    else:
        _manage(job, pods, active, terminating, completed, now, step)
    _write_counts(status, active, terminating, completed, step)
    if target and decided_before and not (step.release or step.delete or terminating or _uncounted(status)):
        _finish(status, target, now, step)
    changed = status != (job.get("status") or {})
    return Plan(
        status if changed else None,
        tuple(step.release),
        tuple(step.delete),
        tuple(step.create),
        tuple(step.notices),
        requeue_after=step.requeue_after,
    )


def unsupported(spec: Object) -> str:
    """Why this controller leaves a Job alone; empty where it does not."""
    if spec.get("completionMode") != "Indexed":
        return "completionMode: this cluster runs Indexed Jobs only"
    for name in ("backoffLimitPerIndex", "successPolicy", "maxFailedIndexes"):
        if spec.get(name) is not None:
            return f"{name}: not supported by this cluster's Job controller"
    return ""


def _after_end(job: Object, ended: Object, tracked: tuple[Object, ...], now: datetime) -> Plan:
    """A Job that has ended is deleted `ttlSecondsAfterFinished` later."""
    ttl = job["spec"].get("ttlSecondsAfterFinished")
    if ttl is None:
        return Plan(release=tracked)
    left = (_time(ended["lastTransitionTime"]) - now).total_seconds() + ttl
    return Plan(release=tracked, delete_job=left <= 0, requeue_after=left if left > 0 else None)


def _count(job: Object, tracked: Sequence[Object], step: _Step) -> tuple[set[int], int]:
    """Counts pods that have ended and marks them for release; the completed indexes and the number of failures."""
    status = step.status
    with_finalizer = {pod["metadata"]["uid"] for pod in tracked}
    waiting = _uncounted(status)
    status["failed"] = status.get("failed", 0) + sum(1 for uid in waiting if uid not in with_finalizer)
    waiting = [uid for uid in waiting if uid in with_finalizer]
    completed = parse_indexes(status.get("completedIndexes") or "")
    for pod in tracked:
        phase = pod["status"].get("phase")
        lost = _terminating(pod) and not only_replace_failed(job)
        if phase not in TERMINAL and not lost:
            continue
        step.release.append(pod)
        index = completion_index(pod)
        if index is None or index >= _completions(job):
            continue
        if phase == "Succeeded":
            completed.add(index)
        elif pod["metadata"]["uid"] not in waiting and not _ignored(job, pod):
            waiting.append(pod["metadata"]["uid"])
    status["uncountedTerminatedPods"] = {"failed": waiting} if waiting else {}
    return completed, status["failed"] + len(waiting)


def _abandon(job: Object, tracked: Sequence[Object], target: Object, step: _Step) -> None:
    """A Job that ends waits for no pod's state: those still there have failed, unless the Job has succeeded."""
    released = {pod["metadata"]["uid"] for pod in step.release}
    rest = [pod for pod in tracked if pod["metadata"]["uid"] not in released]
    step.release += rest
    if target["type"] == "FailureTarget":
        counted = [pod["metadata"]["uid"] for pod in rest if not _ignored(job, pod)]
        if waiting := [*_uncounted(step.status), *counted]:
            step.status["uncountedTerminatedPods"] = {"failed": waiting}


def _ignored(job: Object, pod: Object) -> bool:
    matched = match(job["spec"].get("podFailurePolicy"), pod)
    return matched is not None and matched.action == "Ignore"


def _failure(job: Object, tracked: Sequence[Object], failed: int, now: datetime, step: _Step) -> dict[str, Any] | None:
    """The condition FailureTarget of a Job that must end now; looks ahead to the deadline otherwise."""
    spec = job["spec"]
    for pod in tracked:  # a pod without the finalizer was counted before, or deleted by a suspend
        if pod["status"].get("phase") == "Failed":
            matched = match(spec.get("podFailurePolicy"), pod)
            if matched and matched.action == "FailJob":
                return _new("FailureTarget", "True", "PodFailurePolicy", matched.message, now)
    limit = spec.get("backoffLimit")
    if failed > (6 if limit is None else limit):
        return _new("FailureTarget", "True", "BackoffLimitExceeded", "Job has reached the specified backoff limit", now)
    seconds = spec.get("activeDeadlineSeconds")
    if seconds is not None and not spec.get("suspend"):
        # A number, not a time: whoever writes Jobs may ask for more seconds than there are years.
        left = (_time(step.status["startTime"]) - now).total_seconds() + seconds
        if left <= 0 and not _resuming(job):
            message = "Job was active longer than specified deadline"
            return _new("FailureTarget", "True", "DeadlineExceeded", message, now)
        step.requeue_after = left
    return None


def _resuming(job: Object) -> bool:
    """Its clock starts anew in this very sync."""
    suspended = _condition(job.get("status") or {}, "Suspended")
    return suspended is not None and not job["spec"].get("suspend")


def _manage(
    job: Object,
    pods: Sequence[Object],
    active: list[Object],
    terminating: list[Object],
    completed: set[int],
    now: datetime,
    step: _Step,
) -> None:
    """Creates or deletes pods towards the parallelism that is wanted; suspends and resumes."""
    status = step.status
    if job["spec"].get("suspend"):
        _remove(active, step)
        if _condition(status, "Suspended") is None:
            _set(status, _new("Suspended", "True", "JobSuspended", "Job suspended", now))
            status.pop("startTime", None)
            step.notices.append(Notice("Normal", "Suspended", "Job suspended"))
        return
    if _resuming(job):
        _set(status, _new("Suspended", "False", "JobResumed", "Job resumed", now))
        status["startTime"] = timestamp(now)
        step.notices.append(Notice("Normal", "Resumed", "Job resumed"))
        if (seconds := job["spec"].get("activeDeadlineSeconds")) is not None:
            step.requeue_after = seconds
    completions = _completions(job)
    wanted = min(completions - len(completed), job["spec"].get("parallelism", 1))
    _remove(_surplus(active, wanted, completions), step)
    taken = completed | {index for pod in active if (index := completion_index(pod)) is not None}
    missing = wanted - len(active)
    if only_replace_failed(job):
        missing -= len(terminating)
        taken |= {index for pod in terminating if (index := completion_index(pod)) is not None}
    if step.delete or missing <= 0:
        return
    if (delay := _backoff(job, pods, now)) > 0:
        step.requeue_after = min(delay, step.requeue_after or delay)
        return
    free = [index for index in range(completions) if index not in taken]
    step.create = [make_pod(job, index) for index in free[:missing]]


def _remove(pods: list[Object], step: _Step) -> None:
    """Deletes pods that did no wrong: without their finalizer they are not counted as failures."""
    step.delete = pods
    step.release += pods


def _surplus(active: Sequence[Object], wanted: int, completions: int) -> list[Object]:
    """Pods too many: those with an index that does not count or that another has, then those of the highest indexes."""
    seen: set[int] = set()
    keep, drop = [], []
    for pod in sorted(active, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
        index = completion_index(pod)
        if index is None or index >= completions or index in seen:
            drop.append(pod)
        else:
            seen.add(index)
            keep.append(pod)
    keep.sort(key=lambda pod: completion_index(pod) or 0)
    return drop + keep[max(wanted, 0) :]


def _backoff(job: Object, pods: Sequence[Object], now: datetime) -> float:
    """Seconds to wait before a replacement: 10, 20, 40 … 600 after the failures since the last success."""
    ended = sorted((pod for pod in pods if _terminal(pod)), key=_finish_time, reverse=True)
    row: list[Object] = []
    for pod in ended:
        if pod["status"]["phase"] == "Succeeded":
            break
        if not _ignored(job, pod):
            row.append(pod)
    if not row:
        return 0.0
    wait = min(_BACKOFF_SECONDS * 2 ** (len(row) - 1), _BACKOFF_MAX_SECONDS)
    return (_finish_time(row[0]) + timedelta(seconds=wait) - now).total_seconds()


def _finish_time(pod: Object) -> datetime:
    ends = [
        _time(record["state"]["terminated"]["finishedAt"])
        for record in pod["status"].get("containerStatuses") or []
        if (record.get("state") or {}).get("terminated", {}).get("finishedAt")
    ]
    metadata = pod["metadata"]
    return max(ends, default=_time(metadata.get("deletionTimestamp") or metadata["creationTimestamp"]))


def _write_counts(
    status: dict[str, Any],
    active: Sequence[Object],
    terminating: Sequence[Object],
    completed: set[int],
    step: _Step,
) -> None:
    gone = {pod["metadata"]["uid"] for pod in step.delete}
    left = [pod for pod in active if pod["metadata"]["uid"] not in gone]
    status["ready"] = sum(1 for pod in left if _ready(pod))
    status["terminating"] = len(terminating) + len(step.delete)
    # Zeros and empty texts are left out, as the server does.
    counts = {
        "active": len(left) + len(step.create),
        "succeeded": len(completed),
        "failed": status.get("failed", 0),
        "completedIndexes": format_indexes(completed),
    }
    for name, value in counts.items():
        status.pop(name, None)
        if value:
            status[name] = value


def _finish(status: dict[str, Any], target: Object, now: datetime, step: _Step) -> None:
    success = target["type"] == "SuccessCriteriaMet"
    final = _new("Complete" if success else "Failed", "True", target["reason"], target["message"], now)
    status["conditions"].append(final)
    if success:
        status["completionTime"] = final["lastTransitionTime"]
        step.notices.append(Notice("Normal", "Completed", "Job completed"))
    else:
        step.notices.append(Notice("Warning", target["reason"], target["message"]))


def only_replace_failed(job: Object) -> bool:
    """Whether a pod counts, and is replaced, only once it has ended: the default where there is a podFailurePolicy."""
    policy = job["spec"].get("podReplacementPolicy")
    return policy == "Failed" or (policy is None and bool(job["spec"].get("podFailurePolicy")))


def _completions(job: Object) -> int:
    return int(job["spec"].get("completions", 1))


def _uncounted(status: Object) -> list[str]:
    return list((status.get("uncountedTerminatedPods") or {}).get("failed") or [])


def _terminal(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in TERMINAL


def _terminating(pod: Object) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _condition(status: Object, kind: str) -> dict[str, Any] | None:
    """The condition where it is true."""
    found = [c for c in status.get("conditions") or [] if c["type"] == kind and c["status"] == "True"]
    return found[0] if found else None


def _set(status: dict[str, Any], condition: dict[str, Any]) -> None:
    others = [c for c in status.get("conditions") or [] if c["type"] != condition["type"]]
    status["conditions"] = [*others, condition]


def _new(kind: str, value: str, reason: str, message: str, now: datetime) -> dict[str, Any]:
    at = timestamp(now)
    return {
        "type": kind,
        "status": value,
        "reason": reason,
        "message": message,
        "lastProbeTime": at,
        "lastTransitionTime": at,
    }


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
