"""PURE. What policies decide upon, and what one of them decided."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.failures import Reason
from finetune_api.job import FineTuneJob
from finetune_api.jobstatus import Attempt, State, Terms
from finetune_api.profile import FineTuneProfile
from finetune_operator import attempts as history
from finetune_operator import status
from finetune_operator.accept import Subject
from finetune_operator.manifests import Context
from finetune_operator.observe import Child, Observed, Pod
from finetune_operator.status import Decision
from finetune_operator.turns import Claim, Line

LOOK_AGAIN = datetime.timedelta(seconds=20)
"""For what no watch tells of: a profile that appears, a pod whose node does not answer."""


@dataclass(frozen=True)
class Step:
    """What one policy decided."""

    decision: Decision
    create: tuple[dict[str, Any], ...] = ()
    due: tuple[datetime.datetime | None, ...] = ()
    """When time alone would change the decision."""
    discard: Child | None = None
    """A Job that is of no use any more."""
    claim: Claim | None = None
    """GPUs that it takes now, or waits for."""


@dataclass(frozen=True)
class Situation:
    """Everything that policies decide upon."""

    subject: Subject
    observed: Observed
    attempts: tuple[Attempt, ...]
    """Those whose Jobs were made."""
    now: datetime.datetime
    context: Context
    line: Line

    def fail(self, reason: Reason, message: str, *, accepted: bool = True) -> Step:
        ended = history.close_open(self.attempts, reason, message, self.now, "Permanent")
        return Step(Decision("Failed", message, reason.value, accepted, attempts=ended))

    def gang_of(self, attempt: Attempt) -> tuple[Child, tuple[Pod, ...]]:
        """The Job of an attempt that is open, and its pods."""
        child = next(child for child in self.observed.gangs if child.attempt == attempt.number)
        return child, self.observed.pods_of(child.uid)

    def terms(self, profile: FineTuneProfile | None) -> Terms | None:
        """What of the profile holds: as it was for the attempt that runs, else as it is."""
        last = self.attempts[-1] if self.attempts else None
        begun = last.terms if last and last.outcome is None else None
        return begun or (terms_of(profile) if profile else None)

    def claim(self, profile: FineTuneProfile, gpus: int) -> Claim:
        """To start now."""
        subject, last = self.subject, self.attempts[-1] if self.attempts else None
        return Claim(
            key=(subject.namespace, subject.name),
            profile=profile.metadata.name,
            gpus=gpus,
            since=subject.created,
            holds=False,
            served=last.creation_time if last else None,
            limits=profile.spec.concurrency,
        )

    def stand(self, decision: Decision) -> Decision:
        return replace(decision, attempts=self.attempts)

    def expires(self, since: datetime.datetime, seconds: int | None) -> datetime.datetime | None:
        """When what is waited for since then has taken too long; `seconds` None: never."""
        if seconds is None:
            return None
        suspended = self.subject.status.condition("Suspended")
        resumed = suspended.last_transition_time if suspended else since
        return max(since, resumed) + datetime.timedelta(seconds=seconds)

    def with_warning(self, attempt: Attempt, text: str) -> str:
        """With what the trainer of this attempt says is wrong, though it goes on: over-fitting."""
        trainer = self.subject.status.trainer_status
        current = trainer is not None and trainer.attempt == attempt.number
        return f"{text}; {trainer.warning}" if trainer and current and trainer.warning else text


def terms_of(profile: FineTuneProfile) -> Terms:
    spec = profile.spec
    return Terms(
        scheduling_grace_seconds=spec.scheduling_grace_seconds,
        max_active_deadline_seconds=spec.limits.max_active_deadline_seconds,
    )


def within_pre_running(
    situation: Situation, job: FineTuneJob, since: datetime.datetime, step: Step, own: int | None = None
) -> Step:
    """The step, or the end where what it waits for has taken too long. `own`: seconds, a limit besides the job's."""
    allowed = [seconds for seconds in (job.spec.run_policy.pre_running_deadline_seconds, own) if seconds is not None]
    due = situation.expires(since, min(allowed, default=None))
    if due is None or situation.now < due:
        return replace(step, due=(*step.due, due))
    text = f"did not run within {min(allowed)} preRunningDeadlineSeconds; {step.decision.message}"
    return situation.fail(Reason.PRE_RUNNING_DEADLINE_EXCEEDED, text)


def with_trouble(situation: Situation, pods: Sequence[Pod], state: State, text: str) -> Step:
    found = status.trouble(pods, situation.now)
    if found is None:
        return Step(situation.stand(Decision(state, text)))
    if found.reason is None:
        return Step(situation.stand(Decision(state, text)), due=(found.due,))
    return Step(situation.stand(Decision(state, found.message, found.reason.value)))
