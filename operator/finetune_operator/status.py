"""PURE. What was decided -> conditions, state, the patch that writes them, and the Events that tell of it."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from finetune_api.failures import Reason
from finetune_api.jobstatus import (
    Attempt,
    Condition,
    ConditionType,
    DataStatus,
    FineTuneJobStatus,
    PrepareStatus,
    ResultStatus,
    State,
)
from finetune_api.progress import TrainerStatus
from finetune_api.sizing import Sizing
from finetune_operator.attempts import made
from finetune_operator.observe import Pod

TROUBLE_AFTER = datetime.timedelta(seconds=10)
"""How long a new pod may be unplaced or without its image before a person is told."""


@dataclass(frozen=True)
class Decision:
    """How a job stands. The state's word and why, and everything of the status that is the controller's own."""

    state: State
    message: str
    reason: str = ""
    """Of the closed list, where something is wrong; empty: the state says it all."""
    accepted: bool = True
    attempts: tuple[Attempt, ...] = ()
    prepare: PrepareStatus | None = None
    """Of the Job that is about to be made."""
    data: DataStatus | None = None
    sizing: Sizing | None = None
    result: ResultStatus | None = None
    gpus: int | None = None
    """That the gang asks for."""


class Note(NamedTuple):
    """An Event to come."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


def finished(status: FineTuneJobStatus) -> bool:
    return any(c.type in ("Complete", "Failed") and c.status == "True" for c in status.conditions)


def is_true(status: FineTuneJobStatus, kind: ConditionType) -> bool:
    return any(c.type == kind and c.status == "True" for c in status.conditions)


def build(old: FineTuneJobStatus, decision: Decision, generation: int, now: datetime.datetime) -> FineTuneJobStatus:
    """The new status. `trainerStatus` is another's and stays as it was."""
    conditions = _conditions(old, decision, generation, now)
    trainer = old.trainer_status
    return old.model_copy(
        update={
            "observed_generation": generation,
            "state": state_of(conditions, trainer, decision.attempts),
            "message": decision.message[:4096],
            "conditions": conditions,
            "start_time": old.start_time or (now if decision.accepted else None),
            "completion_time": now if decision.state in ("Complete", "Failed") else None,
            "prepare": decision.prepare or old.prepare,
            "attempts": list(decision.attempts),
            "attempt_count": decision.attempts[-1].number + 1 if decision.attempts else old.attempt_count,
            "gpus": decision.gpus or old.gpus,
            "checkpoint": (trainer and trainer.checkpoint) or old.checkpoint,
            "data": decision.data or old.data,
            "sizing": decision.sizing or old.sizing,
            "result": decision.result or old.result,
        }
    )


def _conditions(old: FineTuneJobStatus, decision: Decision, generation: int, now: datetime.datetime) -> list[Condition]:
    state, reason, text = decision.state, decision.reason or decision.state, decision.message
    over = state in ("Complete", "Failed")
    ended = reason if over else "NotFinished"
    accepted = "Accepted" if decision.accepted else reason
    facts: dict[ConditionType, tuple[bool, str, str]] = {
        "Accepted": (decision.accepted, accepted, "the profile allows it" if decision.accepted else text),
        "Suspended": (
            state == "Suspended",
            reason if state == "Suspended" else "NotSuspended",
            text if state == "Suspended" and decision.reason else "",
        ),
        "Running": (state == "Running", "WorkersRunning" if state == "Running" else reason, text),
        "Complete": (state == "Complete", ended, text if state == "Complete" else ""),
        "Failed": (state == "Failed", ended, text if state == "Failed" else ""),
        # kstatus: what waits for a person's word is not on its way anywhere.
        "Reconciling": (not over and state != "Suspended", state, text),
        "Stalled": (state == "Failed", ended, text if state == "Failed" else ""),
    }
    conditions = []
    for kind, (holds, why, message) in facts.items():
        value: Literal["True", "False"] = "True" if holds else "False"
        before = old.condition(kind)
        unchanged = before is not None and before.status == value
        conditions.append(
            Condition(
                type=kind,
                status=value,
                reason=why,
                message=message,
                last_transition_time=before.last_transition_time if before and unchanged else now,
                observed_generation=generation,
            )
        )
    return conditions


def state_of(conditions: Sequence[Condition], trainer: TrainerStatus | None, attempts: Sequence[Attempt]) -> State:
    """One word for people, from the conditions and, while the gang runs, from what it last told."""
    facts = {c.type: c for c in conditions}
    for word in ("Complete", "Failed", "Suspended"):
        if facts[word].status == "True":
            return word
    if facts["Running"].status == "True":
        current = trainer is not None and bool(attempts) and trainer.attempt == attempts[-1].number
        phase = trainer.phase if trainer and current else None
        return phase if phase in ("Evaluating", "Publishing") else "Running"
    word = facts["Reconciling"].reason
    return word if word in get_args(State) else "Pending"  # type: ignore[return-value]


def patch(old: FineTuneJobStatus, new: FineTuneJobStatus) -> dict[str, Any]:
    """The merge patch from one to the other, without `trainerStatus`; empty where they say the same."""
    changed = _merge_patch(old.to_json(), new.to_json())
    changed.pop("trainerStatus", None)
    return changed


def _merge_patch(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    changed = dict.fromkeys(before.keys() - after.keys())
    for key, value in after.items():
        known = before.get(key)
        if value != known:
            changed[key] = _merge_patch(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return changed


class Trouble(NamedTuple):
    """Why pods do not run, for the status; or when to look again."""

    reason: Reason | None
    message: str
    due: datetime.datetime | None


def trouble(pods: Sequence[Pod], now: datetime.datetime) -> Trouble | None:
    """What keeps the first of these pods from running; None where nothing does, or nothing is known."""
    for pod in pods:
        found = pod_trouble(pod)
        if found is None:
            continue
        due = pod.created + TROUBLE_AFTER
        return Trouble(None, "", due) if now < due else Trouble(found[0], f"{pod.name}: {found[1]}"[:2048], None)
    return None


def pod_trouble(pod: Pod) -> tuple[Reason, str] | None:
    """Why it does not run, however new it is."""
    if pod.over or pod.running:
        return None
    if pod.unschedulable:
        return Reason.UNSCHEDULABLE, pod.unschedulable
    if pod.waiting is None:
        return None
    reason, message = pod.waiting
    if reason in ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"):
        return Reason.IMAGE_PULL_ERROR, f"{reason}: {message}"
    if reason in ("CreateContainerConfigError", "CreateContainerError"):
        # A Secret or one of its keys is missing: the credentials that the job names.
        return Reason.STORAGE_DENIED, f"{reason}: {message}"
    return None


def notes(old: FineTuneJobStatus, new: FineTuneJobStatus) -> tuple[Note, ...]:
    """One for each transition between the two, oldest first."""
    found: list[Note] = []
    # That a job prepares says that it was accepted: one Event for the two.
    if is_true(new, "Accepted") and not is_true(old, "Accepted") and new.state != "Preparing":
        found.append(Note("Normal", "Accepted", "the spec is valid and its profile allows it"))
    if new.data and not old.data and new.sizing:
        sizing, data = new.sizing, new.data
        found.append(
            Note(
                "Normal",
                "Prepared",
                f"{data.train_examples} examples, {data.train_tokens} tokens; {sizing.strategy}, "
                f"micro-batch {sizing.micro_batch_size}, {sizing.memory_per_gpu} bytes per process",
            )
        )
    found += _attempt_notes(old, new)
    if old.sizing and new.sizing and (text := _resized(old.sizing, new.sizing)):
        found.append(Note("Normal", "Resized", text))
    for state in ("Preparing", "Queued", "Suspended", "Running", "Publishing", "Complete"):
        if new.state == state != old.state:
            found.append(Note("Normal", state, new.message or state))
    if old.state == "Suspended" and new.state not in ("Suspended", "Failed"):
        found.append(Note("Normal", "Resumed", "no longer suspended"))
    problem, known = _problem(new), _problem(old)
    if problem and (known is None or known.reason != problem.reason):
        found.append(problem)
    return tuple(found)


def _attempt_notes(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Note]:
    earlier = made(old.attempts)
    before = {attempt.number: attempt for attempt in earlier}
    found = []
    for attempt in new.attempts:
        known = before.get(attempt.number)
        if known is None:
            found.append(Note("Normal", "AttemptStarted", f"created Job {attempt.job}{_fewer(attempt, earlier)}"))
        if attempt.outcome and (known is None or not known.outcome) and attempt.outcome != "Succeeded":
            reason = attempt.reason or attempt.outcome
            found.append(Note("Warning", reason, f"attempt {attempt.number}: {attempt.message or attempt.outcome}"))
    return found


def _fewer(attempt: Attempt, earlier: Sequence[Attempt]) -> str:
    before = earlier[-1].workers if earlier else None
    if not (before and attempt.workers) or before == attempt.workers:
        return ""
    return f"; workers: {attempt.workers} instead of {before}"


def _resized(old: Sizing, new: Sizing) -> str:
    before, after = ((s.micro_batch_size, s.gradient_accumulation) for s in (old, new))
    if before == after:
        return ""
    return (
        f"micro-batch {after[0]} instead of {before[0]} and gradient accumulation {after[1]} instead of {before[1]}: "
        f"a step learns from as many examples as before"
    )


def _problem(status: FineTuneJobStatus) -> Note | None:
    """What is wrong now: a failure, a job that is not accepted, pods that cannot run."""
    for kind in ("Failed", "Accepted", "Running"):
        condition = next((c for c in status.conditions if c.type == kind), None)
        bad = condition is not None and (condition.status == "True") == (kind == "Failed")
        if condition and bad and condition.reason in set(Reason):
            return Note("Warning", condition.reason, condition.message)
    return None
