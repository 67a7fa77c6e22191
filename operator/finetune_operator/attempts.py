"""PURE. status.attempts: what has been tried, brought up to date with what is observed, and what that costs."""

import datetime
import hashlib
from collections import Counter
from collections.abc import Sequence

from finetune_api.failures import Outcome, Reason, outcome_of
from finetune_api.jobstatus import Attempt
from finetune_operator.classify import ending
from finetune_operator.observe import Child, Observed, Pod

KEEP = 256
"""The bound of status.attempts."""
LOST_AFTER = datetime.timedelta(seconds=60)
"""How long after the end of its grace a pod that is being deleted may still be there before its node counts as lost."""
BACKOFF_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 600.0
AVOIDED_FOR = datetime.timedelta(hours=24)
"""How long a node that failed a job is avoided: a day later somebody has repaired it, or it is not to blame."""
MAX_AVOIDED = 32
"""Nodes; more are no bad nodes, but a bad job."""
LESS_MEMORY = (
    "a shorter training.maxLength, tuning.type QLoRA or distribution.offload needs less; a profile's GPUs may have more"
)
"""What is left to a person where a smaller micro-batch does not help."""


def update(known: Sequence[Attempt], observed: Observed, now: datetime.datetime) -> tuple[Attempt, ...]:
    """The attempts with what their Jobs have come to. One whose Job was not made is left out: it is decided anew."""
    children = {child.attempt: child for child in observed.gangs}
    updated: list[Attempt] = []
    for attempt in made(known):
        seen = attempt if attempt.outcome else _observe(attempt, children.get(attempt.number), observed, now)
        updated.append(seen if attempt.outcome else _once_only(seen, updated))
    return bounded(updated)


def made(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """Those whose Job is known to have been made."""
    return tuple(attempt for attempt in attempts if is_made(attempt))


def is_made(attempt: Attempt) -> bool:
    return bool(attempt.uid or attempt.outcome)


def _once_only(ended: Attempt, before: Sequence[Attempt]) -> Attempt:
    """What follows an OutOfMemory has half the micro-batch: where that is too much as well, a third will be."""
    if ended.reason != Reason.OUT_OF_MEMORY or ran_out_of_memory(before) is None:
        return ended
    text = f"{ended.message or 'out of memory again'}; its micro-batch was half of that which was too much before"
    return ended.model_copy(update={"outcome": "Permanent", "message": f"{text}; {LESS_MEMORY}"})


def ran_out_of_memory(attempts: Sequence[Attempt]) -> Attempt | None:
    """The first attempt that a GPU's memory was too small for."""
    return next((attempt for attempt in attempts if attempt.reason == Reason.OUT_OF_MEMORY), None)


def _observe(attempt: Attempt, child: Child | None, observed: Observed, now: datetime.datetime) -> Attempt:
    if child is None or child.deleting:
        return close(attempt, Reason.PREEMPTED, f"Job {attempt.job} was deleted", now)
    if attempt.workers and child.workers != attempt.workers:
        text = f"Job {attempt.job} was changed: it has {child.workers} workers, and was made with {attempt.workers}"
        return close(attempt, Reason.PREEMPTED, text, now, "Retryable")
    pods = observed.pods_of(child.uid)
    end = ending(child, pods, now)
    if end is None:
        if lost := next((pod for pod in pods if is_lost(pod, now)), None):
            text = f"{lost.name}: node {lost.node} does not answer"
            return close(attempt, Reason.NODE_LOST, text, now).model_copy(update={"node": lost.node})
        # A queue that takes its admission back stops the clock: running time starts anew, as after a suspend.
        start = None if child.suspended else attempt.start_time or _started(child, pods)
        return attempt.model_copy(update={"start_time": start})
    return attempt.model_copy(
        update={
            "start_time": attempt.start_time or _started(child, pods),
            "completion_time": end.time,
            "outcome": end.outcome,
            "reason": end.reason.value if end.reason else None,
            "message": end.message or None,
            "exit_code": end.exit_code,
            "rank": end.rank,
            "node": end.node,
            "resumed_from_step": end.resumed_from_step,
        }
    )


def close(
    attempt: Attempt, reason: Reason, message: str, now: datetime.datetime, outcome: Outcome | None = None
) -> Attempt:
    """The attempt, ended by something other than its own pods."""
    changes = {
        "completion_time": now,
        "outcome": outcome or outcome_of(reason),
        "reason": reason.value,
        "message": message,
    }
    return attempt.model_copy(update=changes)


def close_open(
    attempts: Sequence[Attempt], reason: Reason, message: str, now: datetime.datetime, outcome: Outcome | None = None
) -> tuple[Attempt, ...]:
    return tuple(a if a.outcome else close(a, reason, message, now, outcome) for a in attempts)


def _started(child: Child, pods: Sequence[Pod]) -> datetime.datetime | None:
    """When the last worker of the gang began to run; None while one does not."""
    times = {pod.index: pod.started for pod in pods if pod.started}
    return max(times.values()) if len(times) >= child.workers else None


def is_lost(pod: Pod, now: datetime.datetime) -> bool:
    return not pod.over and pod.deletion is not None and now >= pod.deletion + LOST_AFTER


def permanent(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """With the last one's end as final."""
    return (*attempts[:-1], attempts[-1].model_copy(update={"outcome": "Permanent"}))


def failures(attempts: Sequence[Attempt]) -> int:
    """How many of runPolicy.maxAttempts are used up."""
    return sum(attempt.outcome in ("Retryable", "Permanent") for attempt in attempts)


def running_time(
    attempts: Sequence[Attempt], since: datetime.datetime | None, now: datetime.datetime
) -> datetime.timedelta:
    """How long gangs ran, from their last worker's start on, counting those that started after `since`."""
    counted = [a for a in attempts if a.start_time and (since is None or a.start_time >= since)]
    spans = ((a.completion_time or now) - a.start_time for a in counted if a.start_time)
    return sum((max(span, datetime.timedelta()) for span in spans), datetime.timedelta())


def avoided(attempts: Sequence[Attempt], now: datetime.datetime) -> list[str]:
    """Nodes on which attempts failed twice within a day by what may well be the node's fault, by name."""
    blamed = (Reason.NODE_LOST, Reason.HUNG, Reason.RANK_FAILED)
    recent = [
        attempt.node
        for attempt in attempts
        if attempt.node
        and attempt.reason in blamed
        and attempt.completion_time
        and now < attempt.completion_time + AVOIDED_FOR
    ]
    twice = [node for node, count in Counter(recent).items() if count > 1]
    return sorted(sorted(twice, key=recent[::-1].index)[:MAX_AVOIDED])


def backoff(uid: str, failed: int, spread: float = 0.25) -> datetime.timedelta:
    """Before the attempt that follows `failed` failures, in whole seconds: doubled each time, and longer by up to
    `spread`, which the job's UID decides: jobs of a broken node come back one by one, and a replay decides the same."""
    seconds = min(BACKOFF_SECONDS * 2.0 ** max(0, failed - 1), MAX_BACKOFF_SECONDS)
    fraction = int.from_bytes(hashlib.sha256(f"{uid}/{failed}".encode()).digest()[:4], "big") / 2**32
    return datetime.timedelta(seconds=round(seconds * (1 + fraction * spread)))


def bounded(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """At most KEEP: preemptions are forgotten first, because failures are counted."""
    kept = list(attempts)
    while len(kept) > KEEP:
        oldest = next((i for i, attempt in enumerate(kept[:-1]) if attempt.outcome == "Preempted"), 0)
        del kept[oldest]
    return tuple(kept)
