"""PURE. Whether a namespace's budget of GPU-hours lets a gang start, or go on."""

import datetime

from finetune_api import budget as budgets
from finetune_api.budget import HOUR, Account, told
from finetune_api.failures import Reason
from finetune_api.jobstatus import Attempt, FineTuneJobStatus
from finetune_api.profile import FineTuneProfile
from finetune_operator import attempts as history
from finetune_operator.situation import Situation, Step
from finetune_operator.status import Decision


def start(situation: Situation, profile: FineTuneProfile, known: Decision, estimate: float | None) -> Step | None:
    """What is done instead of starting a gang; None: it may start. `estimate`: GPU-hours that the whole job takes."""
    found = _account(situation, profile)
    if found is None:
        return None
    needs = remaining(situation.subject.status, situation.attempts, estimate, situation.now)
    if needs is not None and needs > found.allowed:
        text = f"{_whose(situation, profile)} of {told(found.allowed)} GPU-hours; an estimated {told(needs)} are needed"
        return situation.fail(Reason.BUDGET_EXCEEDED, text)
    left = found.allowed - found.spent
    if left > 0 and (needs is None or needs <= left - found.expected):
        return None
    text = f"{_whose(situation, profile)}: {found}"
    if left > 0 and needs is not None:
        running = f", and {told(found.expected)} by its running jobs" if found.expected else ""
        text += f"; an estimated {told(needs)} are needed{running}"
    return _suspended(situation, known, text, found)


def go_on(situation: Situation, profile: FineTuneProfile | None, attempt: Attempt) -> Step | datetime.datetime | None:
    """The end of an attempt that runs, where the budget is spent; else when it will be, as far as this job goes. None:
    it has no end."""
    if profile is None or attempt.profile != profile.metadata.name or attempt.start_time is None or not attempt.gpus:
        return None
    found = _account(situation, profile)
    if found is None:
        return None
    if found.spent >= found.allowed:
        text = f"{_whose(situation, profile)}: {found}"
        return _suspended(situation, Decision("Suspended", text), text, found)
    left = (found.allowed - found.spent) * HOUR / attempt.gpus
    return situation.now + datetime.timedelta(seconds=max(1.0, left))


def _suspended(situation: Situation, known: Decision, text: str, found: Account) -> Step:
    message = f"{text}; it goes on with the next period, from {found.ends:%Y-%m-%d %H:%M} UTC, or with a larger budget"
    ended = history.close_open(situation.attempts, Reason.BUDGET_EXCEEDED, message, situation.now, "Preempted")
    decision = Decision(
        "Suspended", message, Reason.BUDGET_EXCEEDED.value, attempts=ended, data=known.data, sizing=known.sizing
    )
    return Step(decision, due=(found.ends,))


def _whose(situation: Situation, profile: FineTuneProfile) -> str:
    assert profile.spec.budget
    period = profile.spec.budget.period.lower()
    return (
        f"profile {profile.metadata.name!r} gives namespace {situation.subject.namespace!r} a budget for each {period}"
    )


def _account(situation: Situation, profile: FineTuneProfile) -> Account | None:
    """With what this job alone has spent since everybody's was counted."""
    found = budgets.account(profile, situation.subject.namespace, situation.now)
    if found is None or profile.spec.budget is None:
        return None
    usage = budgets.current(profile.status.usage.get(situation.subject.namespace), profile.spec.budget, situation.now)
    own = [a for a in situation.attempts if a.profile == profile.metadata.name]
    hours = sum(_hours(attempt, usage.until, situation.now) for attempt in own)
    if hours:
        # It ran when everybody's was counted: what is expected of it is in the sum.
        found = found._replace(expected=max(0.0, found.expected - (expected(situation.subject.status) or 0.0)))
    return found._replace(spent=found.spent + hours)


def _hours(attempt: Attempt, since: datetime.datetime, until: datetime.datetime) -> float:
    """GPU-hours of an attempt in a span."""
    if attempt.start_time is None:
        return 0.0
    end = (attempt.completion_time or attempt.start_time) if attempt.outcome else until
    span = min(end, until) - max(attempt.start_time, since)
    return (attempt.gpus or 0) * max(0.0, span.total_seconds()) / HOUR


def expected(status: FineTuneJobStatus) -> float | None:
    """GPU-hours that a running attempt takes still: by its own pace, else by the estimate; None: nobody knows."""
    last, trainer = status.attempts[-1], status.trainer_status
    if trainer and trainer.attempt == last.number and trainer.estimated_remaining_seconds is not None:
        return trainer.estimated_remaining_seconds * (last.gpus or 0) / HOUR
    return status.sizing.estimated_gpu_hours if status.sizing else None


def remaining(
    status: FineTuneJobStatus, attempts: tuple[Attempt, ...], estimate: float | None, now: datetime.datetime
) -> float | None:
    """GPU-hours from the newest checkpoint to the end: by the pace of the attempts so far, else the whole estimate."""
    trainer, checkpoint = status.trainer_status, status.checkpoint
    step = trainer.step if trainer else None
    if trainer is None or not step or not trainer.total_steps or trainer.stage:
        return estimate
    spent = sum(_hours(a, a.start_time, now) for a in attempts if a.start_time)
    done = checkpoint.step if checkpoint else 0
    return spent / step * max(0, trainer.total_steps - done) if spent else estimate
