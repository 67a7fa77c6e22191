"""PURE. A FineTuneJob as the API server sends it -> the few figures of it that are measured."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from finetune_api.bounds import parse_time, whole
from finetune_api.failures import Outcome, Reason
from finetune_api.jobstatus import State
from finetune_operator.accept import MANAGER
from finetune_operator.manifests import JOB_LABEL
from finetune_operator.observe import read_pod

Object = Mapping[str, Any]
Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""
FINISHED = ("Complete", "Failed")
HOLDING = ("Running", "Evaluating", "Publishing")
"""States in which a gang runs."""
STATES: tuple[str, ...] = get_args(State)
OTHER = "other"
"""In place of what would make labels without bound."""
_REASONS = frozenset(map(str, Reason))
_OUTCOMES = frozenset(get_args(Outcome))


class Run(NamedTuple):
    """One attempt. Times are seconds since the epoch."""

    number: int
    gpus: int
    """CPU processes where the profile has no GPU."""
    started: float | None
    """When its last worker began to run."""
    ended: float | None
    outcome: str | None
    """None while it runs."""
    reason: str

    def gpu_seconds(self, now: float) -> float:
        if self.started is None:
            return 0.0
        end = now if self.outcome is None else self.ended or self.started
        return self.gpus * max(0.0, end - self.started)


class Training(NamedTuple):
    """What the attempt that runs has told of itself."""

    attempt: int | None
    phase: str
    step: int | None
    total_steps: int | None
    progress: float | None
    """0 to 1."""
    remaining_seconds: float | None
    reported: float | None
    metrics: Mapping[str, float]


class Moved(NamedTuple):
    """What a pod that has ended had read from the object store and written to it, in bytes."""

    uid: str
    key: Key
    """The FineTuneJob that its labels name."""
    owner: str
    """UID of its Job."""
    ended: float
    read: int
    written: int


class Sight(NamedTuple):
    """One FineTuneJob at one resourceVersion."""

    key: Key
    uid: str
    job_uids: frozenset[str]
    """Of the Jobs that its status knows: what other pods say is not believed."""
    version: int | None
    """None where the server's versions are no numbers: then nothing can be said of their order."""
    created: float
    state: str
    reason: str
    """Of the closed list; empty where nothing is wrong."""
    profile: str
    """That its newest attempt was made under, else that it names."""
    gpus: int
    """That it asks for."""
    since: float | None
    """When it came into its state, as far as its status tells."""
    runs: tuple[Run, ...]
    training: Training | None
    checkpoint: float | None
    """When the newest one was made."""
    completed: float | None
    published_bytes: int

    @property
    def finished(self) -> bool:
        return self.state in FINISHED

    @property
    def word(self) -> str:
        """The state; `Loading` for a gang that runs and has not begun its first step."""
        if self.state != "Running":
            return self.state
        current = (
            self.training if self.training and self.runs and self.training.attempt == self.runs[-1].number else None
        )
        begun = current is not None and (current.step is not None or current.phase not in ("", "Loading"))
        return "Running" if begun else "Loading"

    @property
    def holds(self) -> int:
        """GPUs that it has now."""
        return sum(run.gpus for run in self.runs if run.outcome is None and run.started is not None)

    def gpu_seconds(self, now: float) -> float:
        return sum(run.gpu_seconds(now) for run in self.runs)


def read(raw: Object) -> Sight | None:
    """None where the job is another controller's, or its status is somebody else's handiwork: the reconcile says so."""
    try:
        return _read(raw)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


def _read(raw: Object) -> Sight | None:
    meta, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    if (spec.get("runPolicy") or {}).get("managedBy", MANAGER) != MANAGER:
        return None
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    state = status.get("state") or "Pending"
    state = state if state in STATES else OTHER
    per_worker = whole((spec.get("distribution") or {}).get("gpusPerWorker") or 1)
    attempts = status.get("attempts") or ()
    runs = tuple(_run(attempt, per_worker) for attempt in attempts)
    version = meta.get("resourceVersion", "")
    created = _seconds(meta["creationTimestamp"]) or 0.0
    return Sight(
        key=(_label(meta["namespace"]), _label(meta["name"])),
        uid=meta["uid"],
        job_uids=frozenset(str(made.get("uid")) for made in (status.get("prepare") or {}, *attempts)),
        version=int(version) if version.isdigit() else None,
        created=created,
        state=state,
        reason=_reason(state, conditions),
        profile=_label((attempts[-1].get("profile") if attempts else None) or spec.get("profile") or ""),
        gpus=whole((spec.get("distribution") or {}).get("workers") or 1) * per_worker,
        since=_since(state, created, status, conditions),
        runs=runs,
        training=_training(status.get("trainerStatus")),
        checkpoint=_seconds((status.get("checkpoint") or {}).get("time")),
        completed=_seconds(status.get("completionTime")),
        published_bytes=whole((status.get("result") or {}).get("sizeBytes") or 0),
    )


def moved(raw: Object) -> Moved | None:
    """None while the pod runs, and where it has left no word of it."""
    pod = read_pod(raw)
    said = pod.end.message if pod.end else None
    if pod.end is None or pod.end.finished is None or said is None or said.read_bytes is None:
        return None
    meta = raw["metadata"]
    key = _label(meta["namespace"]), _label(meta["labels"][JOB_LABEL])
    return Moved(meta["uid"], key, pod.owner, pod.end.finished.timestamp(), said.read_bytes, said.written_bytes or 0)


def _run(attempt: Object, per_worker: int) -> Run:
    return Run(
        number=whole(attempt["number"]),
        gpus=whole(attempt.get("gpus") or (attempt.get("workers") or 0) * per_worker),
        started=_seconds(attempt.get("startTime")),
        ended=_seconds(attempt.get("completionTime")),
        outcome=_outcome(attempt.get("outcome")),
        reason=_known(attempt.get("reason")),
    )


def _training(told: Object | None) -> Training | None:
    if not told:
        return None
    progress = _amount(told.get("progressPercentage"))
    return Training(
        attempt=_count(told.get("attempt")),
        phase=told.get("phase") or "",
        step=_count(told.get("step")),
        total_steps=_count(told.get("totalSteps")),
        progress=None if progress is None else progress / 100,
        remaining_seconds=_amount(told.get("estimatedRemainingSeconds")),
        reported=_seconds(told.get("lastUpdatedTime")),
        metrics=dict(_figures(told)),
    )


def _count(value: Any) -> int | None:
    return None if value is None else whole(value)


def _amount(value: Any) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError("it must be finite")
    return None if value is None else float(value)


def _label(value: Any) -> str:
    """As Prometheus takes it: text that UTF-8 can write. Raises ValueError."""
    text = str(value)
    text.encode()
    return text


def _figures(told: Object) -> list[tuple[str, float]]:
    found = []
    for metric in told.get("metrics") or ():
        try:
            value = float(metric["value"])
        except ValueError:
            continue  # A trainer may tell words too.
        if math.isfinite(value):
            found.append((metric["name"], value))
    return found


def _reason(state: str, conditions: Mapping[str, Object]) -> str:
    """What is wrong: a failure, a job that is not accepted, pods that cannot run."""
    if state == "Complete":
        return ""
    for kind in ("Failed", "Stalled", "Accepted", "Running"):
        condition = conditions.get(kind)
        bad = kind in ("Failed", "Stalled")
        if condition and (condition["status"] == "True") == bad and (why := _known(condition["reason"])):
            return why
    return ""


def _outcome(outcome: str | None) -> str | None:
    return outcome if outcome is None or outcome in _OUTCOMES else OTHER


def _known(reason: str | None) -> str:
    return reason if reason in _REASONS else ""


def _since(state: str, created: float, status: Object, conditions: Mapping[str, Object]) -> float | None:
    attempts = status.get("attempts") or ()
    last: Object = attempts[-1] if attempts else {}
    match state:
        case "Pending":
            return created
        case "Preparing":
            return _seconds(status.get("startTime"))
        case "Starting" | "Queued":
            return _seconds(last.get("creationTime"))
        case "Running" | "Evaluating" | "Publishing":
            return _seconds(last.get("startTime"))
        case "Retrying":
            return _seconds(last.get("completionTime"))
        case "Suspended" | "Complete" | "Failed":
            return _seconds((conditions.get(state) or {}).get("lastTransitionTime"))
    return None


def _seconds(text: str | None) -> float | None:
    return parse_time(text).timestamp() if text else None
