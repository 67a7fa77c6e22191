"""PURE. What is wanted and what is observed -> what to do now. Called again whenever either may have changed.

The same arguments give the same plan, and once it is carried out the next one is empty until something else changes, or
until the time that it told: so that nobody has to plan again only because it was carried out.
It is carried out in the order record, create, status, delete, Events. What a Job is made for stands in the status
before it is made, and its UID after; a Job that the status does not know decides nothing, and is deleted unless it is
just what is to be made. Whatever is deleted is already recorded as ended. So a crash at any point leaves a state from
which the next plan goes on.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from finetune_api.failures import MAX_FIGURES, Reason
from finetune_api.figures import foremost
from finetune_api.job import FineTuneJob
from finetune_api.jobstatus import Attempt, FineTuneJobStatus, PrepareStatus, ResultStatus, Terms
from finetune_api.profile import FineTuneProfile
from finetune_api.signature import Statement
from finetune_operator import attempts as history
from finetune_operator import budgeting, manifests, starting, status
from finetune_operator.accept import Refusal, Subject, as_begun, check, complete, select_profile
from finetune_operator.classify import ending, out_of_memory
from finetune_operator.manifests import Context
from finetune_operator.observe import Child, Observed
from finetune_operator.situation import LOOK_AGAIN, Situation, Step, with_trouble, within_pre_running
from finetune_operator.status import Decision, Note
from finetune_operator.turns import Claim, Line

Object = Mapping[str, Any]
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
    claim: Claim | None = None
    """GPUs that the job holds then, or waits for."""


def plan(
    subject: Subject,
    profiles: Sequence[Object],
    observed: Observed,
    now: datetime.datetime,
    context: Context,
    line: Line | None = None,
) -> Plan:
    """`profiles`: the one that the job names, or all of them; `now`: UTC, whole seconds; `line`: what other jobs hold
    and wait for."""
    if subject.deleting or subject.foreign:
        return Plan(subject.status)
    if status.finished(subject.status):
        return _after_the_end(subject, observed, now)
    attempts = history.update(subject.status.attempts, observed, now)
    situation = Situation(subject, observed, attempts, now, context, line or Line())
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
        claim=step.claim or _held(situation, step),
    )


def _held(situation: Situation, step: Step) -> Claim | None:
    """What a gang holds that goes on. What runs counts, whoever started it; what waits in a queue holds nothing."""
    last = step.decision.attempts[-1] if step.decision.attempts else None
    if last is None or last.outcome is not None or not (last.profile and last.uid):
        return None
    child = next((child for child in situation.observed.gangs if child.attempt == last.number), None)
    if child is None or (child.queue and child.suspended):
        return None
    subject = situation.subject
    return Claim(
        (subject.namespace, subject.name), last.profile, last.gpus or 1, subject.created, True, last.creation_time
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


def to_record(old: FineTuneJobStatus, new: FineTuneJobStatus) -> FineTuneJobStatus:
    """The old status with what is about to be made, and with nothing else of the new one."""
    asked = (attempt for attempt in new.attempts if not history.is_made(attempt))
    attempts = history.bounded((*history.made(old.attempts), *asked))
    return old.model_copy(update={"attempts": list(attempts), "prepare": new.prepare})


def with_uids(new: FineTuneJobStatus, created: Sequence[Object]) -> FineTuneJobStatus:
    """The status with the UIDs that the API server gave to the Jobs that were just created."""
    uids = {o["metadata"]["name"]: str(o["metadata"]["uid"]) for o in created if o["kind"] == "Job"}
    attempts = [a.model_copy(update={"uid": a.uid or uids.get(a.job)}) for a in new.attempts]
    prepare = new.prepare and new.prepare.model_copy(update={"uid": new.prepare.uid or uids.get(new.prepare.job)})
    return new.model_copy(update={"attempts": attempts, "prepare": prepare})


def _decide(situation: Situation, profiles: Sequence[Object]) -> Step:
    subject, attempts = situation.subject, situation.attempts
    last = attempts[-1] if attempts else None
    if last and last.outcome == "Succeeded":
        return Step(_complete(situation, last))
    if isinstance(subject.job, Refusal):
        return situation.fail(subject.job.reason, subject.job.message, accepted=False)
    profile = as_begun(select_profile(subject.job.spec.profile, profiles), subject.status.prepare)
    found = profile if isinstance(profile, FineTuneProfile) else None
    job = complete(subject.job, found, subject.status.prepare)
    if isinstance(job, Refusal):
        return situation.fail(job.reason, job.message, accepted=False)
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
    terms = situation.terms(found)
    deadline = _deadline(situation, job, terms)
    if deadline and situation.now >= deadline:
        seconds = job.spec.run_policy.active_deadline_seconds or "the profile's"
        return situation.fail(Reason.DEADLINE_EXCEEDED, f"ran longer than {seconds} activeDeadlineSeconds")
    resumed = starting.unadmitted(situation, last) if last and last.outcome is None else None
    if resumed:
        situation = resumed
    elif last and last.outcome is None:
        spent = budgeting.go_on(situation, found, last)
        if isinstance(spent, Step):
            return spent
        returned = starting.give_back(situation, job, last, terms)
        if returned is None:
            step = starting.run(situation, job, last, terms, deadline)
            return replace(step, due=(*step.due, spent))
        situation = returned
    if isinstance(profile, Refusal):
        step = Step(
            situation.stand(Decision("Pending", profile.message, profile.reason.value, accepted=False)),
            due=(situation.now + LOOK_AGAIN,),
        )
        return within_pre_running(situation, job, subject.created, step)
    if refusal := check(job, profile):
        return situation.fail(refusal.reason, refusal.message, accepted=False)
    return _prepare(situation, job, profile)


def _complete(situation: Situation, last: Attempt) -> Decision:
    result = _result(situation, last)
    text = f"published {result.uri}" if result else "completed; what it published was not told"
    return situation.stand(Decision("Complete", situation.with_warning(last, text), result=result))


def _result(situation: Situation, last: Attempt) -> ResultStatus | None:
    """What an attempt published, as far as its pods tell."""
    child = next((c for c in situation.observed.gangs if c.attempt == last.number), None)
    end = child and ending(child, situation.observed.pods_of(child.uid), situation.now)
    if not (end and end.result):
        return None
    told = end.result.model_copy(update={"metrics": foremost(end.result.metrics, MAX_FIGURES)})
    result = ResultStatus.model_validate(told.model_dump(by_alias=True))
    if situation.context.sign is None:
        return result
    subject = situation.subject
    statement = Statement(
        namespace=subject.namespace,
        job=subject.name,
        job_uid=subject.uid,
        uri=result.uri,
        manifest_sha256=result.manifest_sha256,
    )
    return result.model_copy(update={"signature": situation.context.sign(statement.payload())})


def _prepare(situation: Situation, job: FineTuneJob, profile: FineTuneProfile) -> Step:
    """No gang: is the data ready?"""
    child = situation.observed.prepare
    waiting = Decision("Preparing", "checks and converts the data")
    if child is None:
        objects = manifests.prepare(job, profile, situation.context)
        asked = replace(waiting, prepare=_asked(situation, profile))
        step, own = Step(situation.stand(asked), create=objects), profile.spec.prepare.pre_running_deadline_seconds
        return within_pre_running(situation, job, situation.now, step, own)
    if child.deleting:
        return Step(situation.stand(waiting))
    pods = situation.observed.pods_of(child.uid)
    # Of several tries the last one counts.
    newest = sorted(pods, key=lambda pod: (pod.created, pod.name))[-1:]
    end = ending(child, newest, situation.now) or out_of_memory(child, pods, situation.now)
    if end is None:
        step = with_trouble(situation, newest, "Preparing", waiting.message)
        return _while_preparing(situation, job, profile, child, step)
    if end.outcome != "Succeeded":
        return situation.fail(end.reason or Reason.RANK_FAILED, end.message)
    if end.prepared is None:
        if end.told:
            return situation.fail(Reason.DATA_INVALID, f"{child.name} ended without telling what it prepared")
        # Its pod is gone, and with it the answer. What it uploaded is still there, so that asking again is quick.
        return Step(situation.stand(waiting), discard=child)
    return starting.start(situation, job, profile, end.prepared)


def _asked(situation: Situation, profile: FineTuneProfile) -> PrepareStatus:
    """The record of the Job that is about to be made; the same as before where making it has failed."""
    before, meta = situation.subject.status.prepare, profile.metadata
    return PrepareStatus(
        job=manifests.child_name(situation.subject.name, None),
        profile=meta.name,
        profile_generation=meta.generation,
        creation_time=before.creation_time if before and not before.uid else situation.now,
        defaults=profile.spec.defaults or {},
    )


def _while_preparing(
    situation: Situation, job: FineTuneJob, profile: FineTuneProfile, child: Child, step: Step
) -> Step:
    """The step, or the end where `prepare` has waited or run for too long."""
    pods, limits = situation.observed.pods_of(child.uid), profile.spec.prepare
    started = min((pod.started for pod in pods if pod.started), default=None)
    due = started and started + datetime.timedelta(seconds=limits.active_deadline_seconds)
    if due and situation.now >= due:
        text = (
            f"{child.name} ran longer than {limits.active_deadline_seconds} s, which is all that profile "
            f"{profile.metadata.name!r} gives it (spec.prepare.activeDeadlineSeconds)"
        )
        return situation.fail(Reason.DEADLINE_EXCEEDED, text)
    step = replace(step, due=(*step.due, due))
    if any(pod.running for pod in pods):
        return step
    return within_pre_running(situation, job, child.created, step, limits.pre_running_deadline_seconds)


def _deadline(situation: Situation, job: FineTuneJob, terms: Terms | None) -> datetime.datetime | None:
    """When the running time is used up, if the gang goes on running. A profile's limit holds for all its jobs."""
    own, limit = job.spec.run_policy.active_deadline_seconds, terms and terms.max_active_deadline_seconds
    allowed = min(seconds for seconds in (own, limit) if seconds) if own or limit else None
    if allowed is None:
        return None
    suspended = situation.subject.status.condition("Suspended")
    since = suspended.last_transition_time if suspended else None
    used = history.running_time(situation.attempts, since, situation.now)
    left = datetime.timedelta(seconds=allowed) - used
    runs = bool(situation.attempts) and situation.attempts[-1].outcome is None
    return situation.now + left if runs or left <= datetime.timedelta() else None


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
    whole = (deletion for child in (*unwanted, *old) if not child.deleting for deletion in _whole(child))
    return (*whole, *_outlived(observed, step), *_strays(observed, step.create))


def _strays(observed: Observed, create: Sequence[Object] = ()) -> tuple[Deletion, ...]:
    """Jobs that no status knows; one that is in the way of what is created is looked at there."""
    names = {manifest["metadata"]["name"] for manifest in create}
    strays = (child for child in observed.strays if not child.deleting and child.name not in names)
    return tuple(Deletion("Job", child.name, child.uid) for child in strays)


def _whole(child: Child) -> tuple[Deletion, ...]:
    """The Job comes last: as long as it is there, what belongs to it is still to be deleted. The ConfigMap of `prepare`
    stays, for the next one of the same name."""
    kinds = ("Service", "ConfigMap", "NetworkPolicy") if child.finished else ("Service", "ConfigMap")
    parts = () if child.attempt is None else kinds
    return (*(Deletion(kind, child.name, None) for kind in parts), Deletion("Job", child.name, child.uid))


def _outlived(observed: Observed, step: Step) -> tuple[Deletion, ...]:
    """The NetworkPolicy of a gang that was deleted while it ran: its pods were to save what they had, and nothing else,
    so it goes when the next gang comes, for which they were waited for."""
    if not any(manifest["kind"] == "NetworkPolicy" for manifest in step.create) or len(step.decision.attempts) < 2:
        return ()
    former = step.decision.attempts[-2]
    there = any(child.attempt == former.number for child in observed.gangs)
    return () if there else (Deletion("NetworkPolicy", former.job, None),)


def _after_the_end(subject: Subject, observed: Observed, now: datetime.datetime) -> Plan:
    """A finished job never runs again: what still runs of it goes, and at the end of its ttl it goes itself."""
    running = (child for child in observed.jobs if child.finished is None and not child.deleting)
    left = (*(deletion for child in running for deletion in _whole(child)), *_strays(observed))
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
