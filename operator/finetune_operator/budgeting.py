"""PURE. Whether a namespace's budget of GPU-hours lets a gang start, or go on."""

import datetime
from collections.abc import Sequence

from finetune_api import budget as budgets
from finetune_api.bounds import later
from finetune_api.budget import HOUR, Account, told
from finetune_api.failures import Reason
from finetune_api.jobstatus import Attempt, FineTuneJobStatus
from finetune_api.profile import FineTuneProfile
from finetune_operator import attempts as history
from finetune_operator.meter import Run, expected, run_of
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
    return later(situation.now, max(1.0, left))


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
    own = [run for run in _runs(situation.attempts) if run.profile == profile.metadata.name]
    hours = sum(run.seconds(usage.until, situation.now) for run in own) / HOUR
    if hours:
        # It ran when everybody's was counted: what is expected of it is in the sum.
        found = found._replace(expected=max(0.0, found.expected - (expected(situation.subject.status) or 0.0)))
    return found._replace(spent=found.spent + hours)


def remaining(
    status: FineTuneJobStatus, attempts: tuple[Attempt, ...], estimate: float | None, now: datetime.datetime
) -> float | None:
    """GPU-hours from the newest checkpoint to the end: by the pace of the attempts so far, else the whole estimate."""
    trainer, checkpoint = status.trainer_status, status.checkpoint
    step = trainer.step if trainer else None
    if trainer is None or not step or not trainer.total_steps or trainer.stage:
        return estimate
    spent = sum(run.seconds(run.start, now) for run in _runs(attempts)) / HOUR
    done = checkpoint.step if checkpoint else 0
    return spent / step * max(0, trainer.total_steps - done) if spent else estimate


def _runs(attempts: Sequence[Attempt]) -> list[Run]:
    """Of one job, whichever it is."""
    found = (run_of(("", ""), attempt) for attempt in attempts)
    return [run for run in found if run]
