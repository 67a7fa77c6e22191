"""PURE. An ended Job and its pods -> why it ended, and what that means.

One rank fails and the others die of it: their messages tell of lost connections and of SIGTERM. What counts is the pod
that failed first, and among those that failed within some seconds of it (the clocks of nodes differ, and the kubelet's
times are whole seconds) the one that says most.
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.failures import Outcome, Reason, TerminationMessage, TrainingResult, outcome_of, reason_of_exit_code
from finetune_api.run import PreparedSummary
from finetune_operator.observe import Child, Pod

TOGETHER = datetime.timedelta(seconds=3)
LOST = ("DeletionByTaintManager", "DeletionByPodGC")
"""Reasons of DisruptionTarget that mean: the node does not answer, or is gone."""
MORE_MEMORY = (
    "with the same it would happen again: the FineTuneProfile's spec.resources.memory must be larger, or the job needs "
    "less with distribution.offload None, a shorter training.maxLength or a smaller training.microBatchSize"
)
"""What to change where a pod of the gang used more of its host's memory than it may."""
MORE_MEMORY_TO_PREPARE = (
    "with the same it would happen again: the FineTuneProfile's spec.prepare.memory must be larger, or the dataset's "
    "rows shorter"
)
EXIT_CODE = re.compile(r"failed with exit code (\d+)")


@dataclass(frozen=True)
class Ending:
    outcome: Outcome
    reason: Reason | None
    message: str
    time: datetime.datetime
    exit_code: int | None = None
    rank: int | None = None
    node: str | None = None
    resumed_from_step: int | None = None
    result: TrainingResult | None = None
    prepared: PreparedSummary | None = None
    told: bool = False
    """The pod was still there and had left a message."""


@dataclass(frozen=True)
class Cause:
    """Why one pod failed, and how much that says: the lower the weight the more."""

    weight: int
    reason: Reason
    message: str
    pod: Pod
    said: TerminationMessage | None


def ending(child: Child, pods: Sequence[Pod], now: datetime.datetime) -> Ending | None:
    """How this Job ended; None while it runs."""
    time = child.finished_at or now
    if child.finished == "Complete":
        return _success(pods, time)
    if child.finished == "Failed":
        return _failure(child, pods, time)
    return None


def out_of_memory(child: Child, pods: Sequence[Pod], now: datetime.datetime) -> Ending | None:
    """How this Job ends, though its controller would try again: a new pod would be killed for the same."""
    killed = [pod for pod in pods if pod.out_of_memory]
    return _failure(child, killed, now) if killed else None


def _success(pods: Sequence[Pod], time: datetime.datetime) -> Ending:
    # Worker 0 speaks for the gang; an earlier pod of the same index that failed (prepare retries) does not.
    first = next((pod for pod in pods if pod.index == 0 and pod.phase == "Succeeded"), None)
    said = first.end.message if first and first.end else None
    return Ending(
        "Succeeded",
        None,
        said.message if said else "",
        time,
        exit_code=0,
        node=first.node if first else None,
        resumed_from_step=said.resumed_from_step if said else None,
        result=said.result if said else None,
        prepared=said.prepared if said else None,
        told=first is not None,
    )


def _failure(child: Child, pods: Sequence[Pod], time: datetime.datetime) -> Ending:
    cause = first_cause(pods)
    if cause is None:
        return _unseen(child, time)
    end, said = cause.pod.end, cause.said
    code = said.exit_code if said and said.exit_code else end.exit_code if end else None
    # What the trainer says is a sentence for the user; what is seen from outside needs the pod to be looked at.
    text = cause.message if said and said.message else f"{cause.pod.name}: {cause.message}"
    text = _with_advice(text, cause.reason, child)
    return Ending(
        outcome_of(cause.reason),
        cause.reason,
        text[:2048],
        time,
        exit_code=code,
        rank=said.rank if said else None,
        # A rank that hangs is told of by a launcher that may be on another node.
        node=(said and said.node) or cause.pod.node,
        resumed_from_step=said.resumed_from_step if said else None,
        # A gate that is not met costs no result: it is published first.
        result=said.result if said else None,
        told=said is not None,
    )


def _with_advice(text: str, reason: Reason, child: Child) -> str:
    if reason is not Reason.HOST_OUT_OF_MEMORY:
        return text
    advice = MORE_MEMORY_TO_PREPARE if child.attempt is None else MORE_MEMORY
    return f"{text[: 2048 - len(advice) - 2]}; {advice}"


def first_cause(pods: Sequence[Pod]) -> Cause | None:
    """The cause that the others are victims of; None where no pod that failed is left."""
    causes = [cause for pod in pods if (cause := _cause(pod))]
    if not causes:
        return None
    # A victim may well be the first to end: the pod of the rank that died takes its time to notice.
    causes = [cause for cause in causes if not (cause.said and cause.said.victim)] or causes
    times = [pod_time for cause in causes if (pod_time := _time(cause.pod))]
    if not times:
        return min(causes, key=lambda cause: cause.weight)
    first = min(times)
    early = [cause for cause in causes if (_time(cause.pod) or first) <= first + TOGETHER]
    return min(early, key=lambda cause: (cause.weight, _time(cause.pod) or first, cause.pod.index or 0))


def _time(pod: Pod) -> datetime.datetime | None:
    return pod.end.finished if pod.end else None


def _cause(pod: Pod) -> Cause | None:
    end = pod.end
    said = end.message if end and end.exit_code else None
    if pod.out_of_memory:
        text = (said and said.message) or "the container was killed for using more memory than its limit"
        return Cause(0, Reason.HOST_OUT_OF_MEMORY, text, pod, said)
    if pod.evicted:
        # Its own use of disk or memory: unlike a preemption it would happen again and again, so it costs an attempt.
        return Cause(1, Reason.NODE_LOST, f"evicted: {pod.evicted}", pod, said)
    if pod.disruption:
        reason, text = pod.disruption
        lost = reason in LOST
        return Cause(1, Reason.NODE_LOST if lost else Reason.PREEMPTED, f"{reason}: {text}".strip(": "), pod, said)
    if end is None:
        return Cause(5, Reason.NODE_LOST, "the pod failed without a word", pod, None) if pod.phase == "Failed" else None
    if end.exit_code == 0:
        return None
    reason_ = (said and said.reason) or reason_of_exit_code(end.exit_code)
    text = said.message if said and said.message else _words(end.exit_code, end.text if said is None else "")
    return Cause(_weight(reason_, said), reason_, text, pod, said)


def _weight(reason: Reason, said: TerminationMessage | None) -> int:
    if reason in (Reason.PREEMPTED, Reason.HUNG):
        return 4  # What is stopped, or waits for a rank that died, says so too.
    if reason is not Reason.RANK_FAILED:
        return 2
    return 3 if said and said.exit_code == 1 else 2  # A plain 1 is a traceback, and a lost connection is one too.


def _words(code: int, text: str) -> str:
    killed = f" (signal {code - 128})" if code > 128 else ""
    tail = text.strip().splitlines()[-1:] if text.strip() else []
    return f"ended with exit code {code}{killed}" + (f": {tail[0][:500]}" if tail else " and left no message")


def _unseen(child: Child, time: datetime.datetime) -> Ending:
    """The pods are gone; the Job's condition quotes what its controller saw."""
    found = EXIT_CODE.search(child.message)
    reason = reason_of_exit_code(int(found[1])) if found else Reason.NODE_LOST
    if "DisruptionTarget" in child.message:
        reason = Reason.PREEMPTED
    code = int(found[1]) if found else None
    text = _with_advice(f"{child.name}: {child.message or 'its pods are gone'}", reason, child)
    return Ending(outcome_of(reason), reason, text[:2048], time, exit_code=code)
