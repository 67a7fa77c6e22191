"""PURE. What is wanted and what is observed -> what to do now. Called again whenever either may have changed.

The same arguments give the same plan, and once it is carried out the next one is empty until something else changes, or
until the time that it told: so that nobody has to plan again only because it was carried out.
It is carried out in the order create, status, delete, Events: whatever is deleted is already recorded as ended, so that
a crash at any point leaves a state from which the next plan goes on.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune_api.failures import MAX_FIGURES, Reason
from finetune_api.figures import foremost
from finetune_api.job import FineTuneJob
from finetune_api.jobstatus import Attempt, DataStatus, FineTuneJobStatus, ResultStatus, State
from finetune_api.profile import FineTuneProfile
from finetune_api.run import PreparedSummary
from finetune_api.sizing import DoesNotFit
from finetune_operator import attempts as history
from finetune_operator import capacity, manifests, status
from finetune_operator.accept import Refusal, Subject, check, select_profile
from finetune_operator.classify import ending
from finetune_operator.fitting import NothingSmaller, fit
from finetune_operator.manifests import Context
from finetune_operator.observe import Child, Observed, Pod
from finetune_operator.status import Decision, Note

Object = Mapping[str, Any]
LOOK_AGAIN = datetime.timedelta(seconds=20)
"""For what no watch tells of: a profile that appears, a pod whose node does not answer."""
KEEP_ENDED = 3
"""Attempts that ended of which the Job, its pods and their logs are kept, the newest."""


class Deletion(NamedTuple):
    kind: str
    name: str
    uid: str | None
    """None: that of the object of this name, if it is the job's own."""
    resource_version: str | None = None


@dataclass(frozen=True)
class Plan:
    status: FineTuneJobStatus
    create: tuple[dict[str, Any], ...] = ()
    delete: tuple[Deletion, ...] = ()
    events: tuple[Note, ...] = ()
    requeue_after: float | None = None
    """Seconds; None: the next watch event is soon enough."""


@dataclass(frozen=True)
class Step:
    """What one policy decided."""

    decision: Decision
    create: tuple[dict[str, Any], ...] = ()
    due: tuple[datetime.datetime | None, ...] = ()
    """When time alone would change the decision."""
    discard: Child | None = None
    """A Job that is of no use any more."""


@dataclass(frozen=True)
class Situation:
    """Everything that policies decide upon."""

    subject: Subject
    observed: Observed
    attempts: tuple[Attempt, ...]
    now: datetime.datetime
    context: Context

    def fail(self, reason: Reason, message: str, *, accepted: bool = True) -> Step:
        ended = history.close_open(self.attempts, reason, message, self.now, "Permanent")
        return Step(Decision("Failed", message, reason.value, accepted, attempts=ended))

    def gang_of(self, attempt: Attempt) -> tuple[Child, tuple[Pod, ...]]:
        """The Job of an attempt that is open, and its pods."""
        child = next(child for child in self.observed.gangs if child.attempt == attempt.number)
        return child, self.observed.pods_of(child.uid)

    def stand(self, decision: Decision) -> Decision:
        return replace(decision, attempts=self.attempts)


def plan(
    subject: Subject, profiles: Sequence[Object], observed: Observed, now: datetime.datetime, context: Context
) -> Plan:
    """`profiles`: the one that the job names, or all of them; `now`: UTC, whole seconds."""
    if subject.deleting or subject.foreign:
        return Plan(subject.status)
    if status.finished(subject.status):
        return _after_the_end(subject, observed, now)
    attempts = history.update(subject.status.attempts, observed, now)
    situation = Situation(subject, observed, attempts, now, context)
    step = _decide(situation, profiles)
    new = status.build(subject.status, step.decision, subject.generation, now)
    if step.decision.state in ("Complete", "Failed") and subject.ttl_seconds is not None:
        step = replace(step, due=(now + datetime.timedelta(seconds=subject.ttl_seconds),))
    return Plan(
        status=new,
        create=step.create,
        delete=_superfluous(observed, step),
        events=status.notes(subject.status, new),
        requeue_after=_earliest(step.due, now),
    )


def collision(subject: Subject, kind: str, name: str, now: datetime.datetime) -> Plan:
    """The plan where a child's name is taken by somebody else's object."""
    text = (
        f"metadata.name: {kind} {subject.namespace}/{name} exists and is not this job's; delete it, or rename the job"
    )
    attempts = history.close_open(subject.status.attempts, Reason.INVALID_SPEC, text, now, "Permanent")
    decision = Decision("Failed", text, Reason.INVALID_SPEC.value, attempts=attempts)
    new = status.build(subject.status, decision, subject.generation, now)
    # What runs of it is deleted by the next plan.
    return Plan(status=new, events=status.notes(subject.status, new), requeue_after=0.0)


def with_uids(new: FineTuneJobStatus, created: Sequence[Object]) -> FineTuneJobStatus:
    """The status with the UIDs that the API server gave to the Jobs that were just created."""
    uids = {o["metadata"]["name"]: o["metadata"]["uid"] for o in created if o["kind"] == "Job"}
    attempts = [a.model_copy(update={"uid": a.uid or uids.get(a.job)}) for a in new.attempts]
    return new.model_copy(update={"attempts": attempts})


def _decide(situation: Situation, profiles: Sequence[Object]) -> Step:
    subject, attempts = situation.subject, situation.attempts
    last = attempts[-1] if attempts else None
    if last and last.outcome == "Succeeded":
        return Step(_complete(situation, last))
    if isinstance(subject.job, Refusal):
        return situation.fail(subject.job.reason, subject.job.message, accepted=False)
    job = subject.job
    if last and last.outcome == "Permanent":
        step = situation.fail(Reason(last.reason or Reason.RANK_FAILED), last.message or "")
        return replace(step, decision=replace(step.decision, result=_result(situation, last)))
    failed = history.failures(attempts)
    if last and failed >= job.spec.run_policy.max_attempts:
        cause = f"the last: {last.reason}: {last.message}"
        return situation.fail(Reason.MAX_ATTEMPTS_REACHED, f"{failed} attempts failed, all that are allowed; {cause}")
    if job.spec.run_policy.suspend:
        text = "suspended by spec.runPolicy.suspend"
        stopped = history.close_open(attempts, Reason.PREEMPTED, text, situation.now)
        return Step(Decision("Suspended", text, attempts=stopped))
    profile = select_profile(job.spec.profile, profiles)
    found = profile if isinstance(profile, FineTuneProfile) else None
    deadline = _deadline(situation, job, found)
    if deadline and situation.now >= deadline:
        seconds = job.spec.run_policy.active_deadline_seconds or "the profile's"
        return situation.fail(Reason.DEADLINE_EXCEEDED, f"ran longer than {seconds} activeDeadlineSeconds")
    if last and last.outcome is None:
        returned = _give_back(situation, job, last, found)
        if returned is None:
            return _run(situation, job, last, found, deadline)
        situation = returned
    if isinstance(profile, Refusal):
        step = Step(
            situation.stand(Decision("Pending", profile.message, profile.reason.value, accepted=False)),
            due=(situation.now + LOOK_AGAIN,),
        )
        return _within_pre_running(situation, job, subject.created, step)
    if refusal := check(job, profile):
        return situation.fail(refusal.reason, refusal.message, accepted=False)
    return _prepare(situation, job, profile)


def _complete(situation: Situation, last: Attempt) -> Decision:
    result = _result(situation, last)
    text = f"published {result.uri}" if result else "completed; what it published was not told"
    return situation.stand(Decision("Complete", _with_warning(situation, last, text), result=result))


def _with_warning(situation: Situation, attempt: Attempt, text: str) -> str:
    """With what the trainer of this attempt says is wrong, though it goes on: over-fitting."""
    trainer = situation.subject.status.trainer_status
    current = trainer is not None and trainer.attempt == attempt.number
    return f"{text}; {trainer.warning}" if trainer and current and trainer.warning else text


def _result(situation: Situation, last: Attempt) -> ResultStatus | None:
    """What an attempt published, as far as its pods tell."""
    child = next((c for c in situation.observed.gangs if c.attempt == last.number), None)
    end = child and ending(child, situation.observed.pods_of(child.uid), situation.now)
    if not (end and end.result):
        return None
    told = end.result.model_copy(update={"metrics": foremost(end.result.metrics, MAX_FIGURES)})
    return ResultStatus.model_validate(told.model_dump(by_alias=True))


def _give_back(
    situation: Situation, job: FineTuneJob, attempt: Attempt, profile: FineTuneProfile | None
) -> Situation | None:
    """The situation without the attempt that has not found room for all of its gang, where it is time for that."""
    due = _returned_at(situation, job, attempt, profile)
    if due is None:
        return None
    child, pods = situation.gang_of(attempt)
    found, waited = capacity.seats(child, pods), capacity.waiting(situation.attempts)
    least, seconds = job.spec.distribution.min_workers, job.spec.run_policy.pre_running_deadline_seconds
    expires = _expires(situation, job, waited.since) if waited else None
    if expires and situation.now >= expires:
        if least is None or found.placed < least:
            return None  # nothing is left but the end, which `_run` tells
        why = f"within {seconds} preRunningDeadlineSeconds"
    elif situation.now >= due and profile:
        why = f"within {profile.spec.scheduling_grace_seconds} s"
        why += ", away from the nodes that failed" if child.selective else ""
    else:
        return None
    returned = capacity.give_back(attempt, found, why, situation.now)
    return replace(situation, attempts=(*situation.attempts[:-1], returned))


def _returned_at(
    situation: Situation, job: FineTuneJob, attempt: Attempt, profile: FineTuneProfile | None
) -> datetime.datetime | None:
    """When the attempt will have held a part of what it needs for long enough."""
    child, pods = situation.gang_of(attempt)
    found = capacity.seats(child, pods)
    # One that refuses nodes may find no room at all because of that; otherwise what holds nothing may wait.
    since = found.since or (child.created if child.selective else None)
    if since is None or profile is None or found.placed == found.of:
        return None
    if attempt.start_time or child.suspended or _queue(job):
        return None
    return _grace_of(profile, since)


def _grace_of(profile: FineTuneProfile, since: datetime.datetime) -> datetime.datetime:
    return since + datetime.timedelta(seconds=profile.spec.scheduling_grace_seconds)


def _run(
    situation: Situation,
    job: FineTuneJob,
    attempt: Attempt,
    profile: FineTuneProfile | None,
    deadline: datetime.datetime | None,
) -> Step:
    """The gang exists: is it queued, does it start, does it run?"""
    child, pods = situation.gang_of(attempt)
    # Nothing tells when a node stops answering; only the pod's deletion, and then time.
    lost = [pod.deletion + history.LOST_AFTER for pod in pods if pod.deletion and not pod.over]
    if attempt.start_time:
        text = f"attempt {attempt.number} runs on {_workers(job, child.workers)}"
        decision = Decision("Running", _with_warning(situation, attempt, text))
        return Step(situation.stand(decision), due=(deadline, *lost))
    if child.suspended:
        step = Step(situation.stand(Decision("Queued", _start_text(job, attempt))))
    else:
        text = f"attempt {attempt.number} starts {_workers(job, child.workers)}"
        step = _with_trouble(situation, pods, "Starting", text)
    waited = capacity.waiting(situation.attempts)
    due = (*step.due, *lost, _returned_at(situation, job, attempt, profile))
    return _within_pre_running(situation, job, waited.since if waited else child.created, replace(step, due=due))


def _prepare(situation: Situation, job: FineTuneJob, profile: FineTuneProfile) -> Step:
    """No gang: is the data ready?"""
    child = situation.observed.prepare
    waiting = Decision("Preparing", "checks and converts the data")
    if child is None:
        objects = manifests.prepare(job, profile, situation.context)
        return _within_pre_running(situation, job, situation.now, Step(situation.stand(waiting), create=objects))
    if child.deleting:
        return Step(situation.stand(waiting))
    pods = situation.observed.pods_of(child.uid)
    # Of several tries the last one counts.
    newest = sorted(pods, key=lambda pod: (pod.created, pod.name))[-1:]
    end = ending(child, newest, situation.now)
    if end is None:
        step = _with_trouble(situation, newest, "Preparing", waiting.message)
        running = any(pod.running for pod in newest)
        return step if running else _within_pre_running(situation, job, child.created, step)
    if end.outcome != "Succeeded":
        return situation.fail(end.reason or Reason.RANK_FAILED, end.message)
    if end.prepared is None:
        if end.told:
            return situation.fail(Reason.DATA_INVALID, f"{child.name} ended without telling what it prepared")
        # Its pod is gone, and with it the answer. What it uploaded is still there, so that asking again is quick.
        return Step(situation.stand(waiting), discard=child)
    return _start(situation, job, profile, end.prepared)


def _start(situation: Situation, job: FineTuneJob, profile: FineTuneProfile, prepared: PreparedSummary) -> Step:
    """The data is ready and no gang runs: may the next attempt begin?"""
    waited = capacity.waiting(situation.attempts)
    expires = _expires(situation, job, waited.since) if waited else None
    overdue = expires is not None and situation.now >= expires
    workers = (waited and waited.workers) or job.spec.distribution.workers
    try:
        if waited and overdue:
            smaller = capacity.fewer(job, profile, prepared, situation.attempts, waited)
            if smaller is None:
                return _no_room(situation, job)
            workers, found = smaller
        else:
            found = fit(job, profile, prepared, situation.attempts, workers)
    except DoesNotFit as error:
        return situation.fail(Reason.DOES_NOT_FIT, str(error))
    except NothingSmaller as error:
        ended = replace(situation, attempts=history.permanent(situation.attempts))
        return ended.fail(Reason.OUT_OF_MEMORY, str(error))
    last = situation.attempts[-1] if situation.attempts else None
    number, data, sizing = last.number + 1 if last else 0, _data(prepared), found.largest
    if last and last.outcome == "Retryable" and last.completion_time:
        due = last.completion_time + history.backoff(situation.subject.uid, history.failures(situation.attempts))
        if situation.now < due:
            how = f" with {found.smaller}" if last.reason == Reason.OUT_OF_MEMORY else ""
            text = f"attempt {number} starts at {due:%H:%M:%S} UTC{how}; {last.reason}: {last.message}"
            return Step(situation.stand(Decision("Retrying", text, data=data, sizing=sizing)), due=(due,))
    if last and waited and not overdue:
        due = situation.now if last.completion_time is None else last.completion_time
        due += history.backoff(situation.subject.uid, waited.returned, spread=1.0)
        if situation.now < due:
            text = f"attempt {number} starts at {due:%H:%M:%S} UTC; attempt {last.number}: {last.message}"
            return Step(situation.stand(Decision("Queued", text, data=data, sizing=sizing)), due=(due, expires))
    if lingering := _lingering(situation):
        text = f"attempt {number} waits for {', '.join(lingering[:3])} of the one before to end"
        decision = situation.stand(Decision("Starting", text, data=data, sizing=sizing))
        return Step(decision, due=(situation.now + LOOK_AGAIN,))
    attempt = Attempt(
        number=number,
        job=manifests.child_name(job.metadata.name, number),
        workers=workers,
        creation_time=situation.now,
    )
    # Where a gang did not find room, a node that failed is better than none.
    strictly = waited is None and _queue(job) is None
    affinity = manifests.without(history.avoided(situation.attempts, situation.now), strictly=strictly)
    step = Step(
        Decision(
            "Queued" if _queue(job) else "Starting",
            _start_text(job, attempt),
            attempts=history.bounded((*situation.attempts, attempt)),
            data=data,
            sizing=sizing,
            gpus=manifests.devices(job.spec, profile.spec, workers).world_size,
        ),
        create=manifests.gang(
            job, profile, situation.context, number, prepared, found.sizings, workers=workers, affinity=affinity
        ),
        due=(_grace_of(profile, situation.now) if affinity and strictly else None,),
    )
    since = waited.since if waited and not overdue else situation.now
    return _within_pre_running(situation, job, since, step)


def _no_room(situation: Situation, job: FineTuneJob) -> Step:
    last, least = situation.attempts[-1], job.spec.distribution.min_workers
    text = f"did not run within {job.spec.run_policy.pre_running_deadline_seconds} preRunningDeadlineSeconds"
    if least:
        text += f", nor with the {least} of spec.distribution.minWorkers"
    return situation.fail(Reason.PRE_RUNNING_DEADLINE_EXCEEDED, f"{text}; attempt {last.number}: {last.message}")


def _queue(job: FineTuneJob) -> str | None:
    return job.spec.queue.name if job.spec.queue else None


def _start_text(job: FineTuneJob, attempt: Attempt) -> str:
    if queue := _queue(job):
        return f"attempt {attempt.number} waits for queue {queue}"
    return f"attempt {attempt.number} starts {_workers(job, attempt.workers or job.spec.distribution.workers)}"


def _data(prepared: PreparedSummary) -> DataStatus:
    return DataStatus(
        train_examples=prepared.train_examples,
        validation_examples=prepared.validation_examples,
        test_examples=prepared.test_examples,
        train_tokens=prepared.train_tokens,
        dropped=prepared.dropped,
        message=prepared.message or None,
        report_uri=prepared.report_uri,
    )


def _with_trouble(situation: Situation, pods: Sequence[Pod], state: State, text: str) -> Step:
    found = status.trouble(pods, situation.now)
    if found is None:
        return Step(situation.stand(Decision(state, text)))
    if found.reason is None:
        return Step(situation.stand(Decision(state, text)), due=(found.due,))
    return Step(situation.stand(Decision(state, found.message, found.reason.value)))


def _deadline(situation: Situation, job: FineTuneJob, profile: FineTuneProfile | None) -> datetime.datetime | None:
    """When the running time is used up, if the gang goes on running. A profile's limit holds for all its jobs."""
    own, limit = (
        job.spec.run_policy.active_deadline_seconds,
        profile and profile.spec.limits.max_active_deadline_seconds,
    )
    allowed = min(seconds for seconds in (own, limit) if seconds) if own or limit else None
    if allowed is None:
        return None
    suspended = situation.subject.status.condition("Suspended")
    since = suspended.last_transition_time if suspended else None
    used = history.running_time(situation.attempts, since, situation.now)
    left = datetime.timedelta(seconds=allowed) - used
    runs = bool(situation.attempts) and situation.attempts[-1].outcome is None
    return situation.now + left if runs or left <= datetime.timedelta() else None


def _expires(situation: Situation, job: FineTuneJob, since: datetime.datetime) -> datetime.datetime | None:
    """When what is waited for since then has taken too long."""
    seconds = job.spec.run_policy.pre_running_deadline_seconds
    if seconds is None:
        return None
    suspended = situation.subject.status.condition("Suspended")
    resumed = suspended.last_transition_time if suspended else since
    return max(since, resumed) + datetime.timedelta(seconds=seconds)


def _within_pre_running(situation: Situation, job: FineTuneJob, since: datetime.datetime, step: Step) -> Step:
    """The step, or the end where what it waits for has taken too long."""
    due = _expires(situation, job, since)
    if due is None or situation.now < due:
        return replace(step, due=(*step.due, due))
    seconds = job.spec.run_policy.pre_running_deadline_seconds
    text = f"did not run within {seconds} preRunningDeadlineSeconds; {step.decision.message}"
    return situation.fail(Reason.PRE_RUNNING_DEADLINE_EXCEEDED, text)


def _lingering(situation: Situation) -> list[str]:
    """Pods of former attempts that may still write: the next one waits for them, but not for those of a lost node."""
    former = {attempt.uid for attempt in situation.attempts} | {child.uid for child in situation.observed.gangs}
    pods = (pod for pod in situation.observed.pods if pod.owner in former)
    return [pod.name for pod in pods if not pod.over and not history.is_lost(pod, situation.now)]


def _superfluous(observed: Observed, step: Step) -> tuple[Deletion, ...]:
    """Jobs that still run though they are recorded as ended, or though nothing may run; and those whose logs nobody
    reads any more."""
    still = step.decision.state not in ("Suspended", "Failed", "Complete")
    open_jobs = {a.number for a in step.decision.attempts if a.outcome is None}
    unwanted = [
        child
        for child in observed.jobs
        if child is step.discard
        or (child.finished is None and not (still and (child.attempt is None or child.attempt in open_jobs)))
    ]
    ended = {a.number for a in step.decision.attempts if a.outcome}
    old = [child for child in observed.gangs if child.finished and child.attempt in ended][:-KEEP_ENDED]
    return tuple(deletion for child in (*unwanted, *old) if not child.deleting for deletion in _whole(child))


def _whole(child: Child) -> tuple[Deletion, ...]:
    """The Job comes last: as long as it is there, what belongs to it is still to be deleted. The ConfigMap of `prepare`
    stays, for the next one of the same name."""
    parts = () if child.attempt is None else ("Service", "ConfigMap")
    return (*(Deletion(kind, child.name, None) for kind in parts), Deletion("Job", child.name, child.uid))


def _after_the_end(subject: Subject, observed: Observed, now: datetime.datetime) -> Plan:
    """A finished job never runs again: what still runs of it goes, and at the end of its ttl it goes itself."""
    running = (child for child in observed.jobs if child.finished is None and not child.deleting)
    left = tuple(deletion for child in running for deletion in _whole(child))
    ttl = subject.ttl_seconds
    if ttl is None or subject.status.completion_time is None:
        return Plan(subject.status, delete=left)
    due = subject.status.completion_time + datetime.timedelta(seconds=ttl)
    if now < due:
        return Plan(subject.status, delete=left, requeue_after=(due - now).total_seconds())
    itself = Deletion("FineTuneJob", subject.name, subject.uid, subject.resource_version)
    return Plan(subject.status, delete=(itself,))


def _earliest(due: Sequence[datetime.datetime | None], now: datetime.datetime) -> float | None:
    times = [time for time in due if time is not None]
    return max(0.0, (min(times) - now).total_seconds()) if times else None


def _workers(job: FineTuneJob, count: int) -> str:
    wanted = job.spec.distribution.workers
    few = f", of {wanted} that are wanted" if count < wanted else ""
    return ("one worker" if count == 1 else f"{count} workers") + few
