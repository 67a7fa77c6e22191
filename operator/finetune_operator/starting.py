"""PURE. Prepared data -> a gang that runs: it is asked for, waits for its room, and gives back what is not enough."""

import datetime
from dataclasses import replace

from finetune_api.failures import Reason
from finetune_api.job import FineTuneJob
from finetune_api.jobstatus import Attempt, DataStatus, State, Terms
from finetune_api.profile import FineTuneProfile
from finetune_api.run import PreparedSummary
from finetune_api.sizing import DoesNotFit
from finetune_operator import attempts as history
from finetune_operator import budgeting, capacity, manifests
from finetune_operator.capacity import Wait
from finetune_operator.fitting import Fit, NothingSmaller, fit, gpu_hours
from finetune_operator.situation import LOOK_AGAIN, Situation, Step, terms_of, with_trouble, within_pre_running
from finetune_operator.status import Decision

ASK_QUEUE_FIRST = datetime.timedelta(seconds=5)
"""How long a gang waits in a queue before that is asked why."""
ASK_QUEUE = datetime.timedelta(seconds=60)
"""How often a queue is asked why a gang waits: no watch tells. That it is admitted, its Job tells at once."""


def start(situation: Situation, job: FineTuneJob, profile: FineTuneProfile, prepared: PreparedSummary) -> Step:
    """The data is ready and no gang runs: may the next attempt begin?"""
    waited = capacity.waiting(situation.attempts)
    expires = _expires(situation, job, waited.since) if waited else None
    overdue = waited if expires and situation.now >= expires else None
    wanted = _wanted(situation, job, profile, prepared, overdue)
    if isinstance(wanted, Step):
        return wanted
    workers, found = wanted
    # Where a gang did not find room, a node that failed is better than none.
    strictly = waited is None and _queue(job) is None
    affinity = manifests.without(history.avoided(situation.attempts, situation.now), strictly=strictly)
    attempt = _attempt(situation, job, profile, workers, avoids_nodes=bool(affinity and strictly))
    number = attempt.number
    estimate = gpu_hours(job, profile, prepared, found.sizings)
    sizing = found.largest.model_copy(update={"estimated_gpu_hours": estimate and round(estimate, 3)})
    known = Decision("Starting", "", data=_data(prepared), sizing=sizing)
    if held := budgeting.start(situation, profile, known, estimate):
        return held
    due, state, why = _pause(situation, found, overdue is None)
    if due and situation.now < due:
        text = f"attempt {number} starts at {due:%H:%M:%S} UTC{why}"
        return Step(situation.stand(replace(known, state=state, message=text)), due=(due, expires))
    if lingering := _lingering(situation, attempt):
        text = f"attempt {number} waits for {', '.join(lingering[:3])} of the one before to end"
        return Step(situation.stand(replace(known, message=text)), due=(situation.now + LOOK_AGAIN,))
    claim = None if _queue(job) else situation.claim(profile, attempt.gpus or 1)
    if claim and (reason := situation.line.why_not(claim)):
        text = f"attempt {number} waits for its turn: {reason}"
        step = Step(situation.stand(replace(known, state="Queued", message=text)), claim=claim)
        return within_pre_running(situation, job, _ready_since(situation), step)
    decision = replace(
        known,
        state="Queued" if _queue(job) else "Starting",
        message=_start_text(job, attempt),
        attempts=history.bounded((*situation.attempts, attempt)),
        gpus=attempt.gpus,
    )
    objects = manifests.gang(
        job, profile, situation.context, number, prepared, found.sizings, workers=workers, affinity=affinity
    )
    grace = _grace_of(terms_of(profile), situation.now)
    asked = situation.now + ASK_QUEUE_FIRST if _queue(job) else None
    looks = (grace if attempt.avoids_nodes else None, asked)
    step = Step(decision, objects, looks, claim=claim and claim._replace(holds=True, served=situation.now))
    return within_pre_running(situation, job, waited.since if waited and not overdue else situation.now, step)


def _attempt(
    situation: Situation, job: FineTuneJob, profile: FineTuneProfile, workers: int, *, avoids_nodes: bool
) -> Attempt:
    """The next one, asked for now or, where making its Job has failed, when it was asked for first."""
    number = situation.attempts[-1].number + 1 if situation.attempts else 0
    recorded = situation.subject.status.attempts
    again = recorded[-1] if recorded and not history.is_made(recorded[-1]) else None
    return Attempt(
        number=number,
        job=manifests.child_name(job.metadata.name, number),
        profile=profile.metadata.name,
        profile_generation=profile.metadata.generation,
        terms=terms_of(profile),
        queue=_queue(job),
        avoids_nodes=avoids_nodes or None,
        workers=workers,
        gpus=manifests.devices(job.spec, profile.spec, workers).world_size,
        creation_time=again.creation_time if again else situation.now,
    )


def _ready_since(situation: Situation) -> datetime.datetime:
    """When the next attempt could have begun."""
    last, prepared = situation.attempts[-1] if situation.attempts else None, situation.observed.prepare
    return (last and last.completion_time) or (prepared and prepared.finished_at) or situation.now


def _wanted(
    situation: Situation, job: FineTuneJob, profile: FineTuneProfile, prepared: PreparedSummary, overdue: Wait | None
) -> tuple[int, Fit] | Step:
    """How many workers are asked for, and how they are placed; or the end. `overdue`: what was waited for too long."""
    waited = capacity.waiting(situation.attempts)
    workers = (waited and waited.workers) or job.spec.distribution.workers
    try:
        if overdue is None:
            return workers, fit(job, profile, prepared, situation.attempts, workers)
        return capacity.fewer(job, profile, prepared, situation.attempts, overdue) or _no_room(situation, job)
    except DoesNotFit as error:
        return situation.fail(Reason.DOES_NOT_FIT, str(error))
    except NothingSmaller as error:
        ended = replace(situation, attempts=history.permanent(situation.attempts))
        return ended.fail(Reason.OUT_OF_MEMORY, str(error))


def _pause(situation: Situation, found: Fit, again: bool) -> tuple[datetime.datetime | None, State, str]:
    """Until when the next attempt waits after the last one, how that is called, and why it is so.

    `again`: it is as large as what gave its place back.
    """
    last, waited = situation.attempts[-1] if situation.attempts else None, capacity.waiting(situation.attempts)
    if last is None or last.completion_time is None:
        return None, "Starting", ""
    uid = situation.subject.uid
    if last.outcome == "Retryable":
        how = f" with {found.smaller}" if last.reason == Reason.OUT_OF_MEMORY else ""
        due = last.completion_time + history.backoff(uid, history.failures(situation.attempts))
        return due, "Retrying", f"{how}; {last.reason}: {last.message}"
    if waited and again:
        # Two gangs that stood in each other's way must not come back at the same moment.
        due = last.completion_time + history.backoff(uid, waited.returned, spread=1.0)
        return due, "Queued", f"; attempt {last.number}: {last.message}"
    return None, "Starting", ""


def _no_room(situation: Situation, job: FineTuneJob) -> Step:
    last, least = situation.attempts[-1], job.spec.distribution.min_workers
    text = f"did not run within {job.spec.run_policy.pre_running_deadline_seconds} preRunningDeadlineSeconds"
    if least:
        text += f", nor with the {least} of spec.distribution.minWorkers"
    return situation.fail(Reason.PRE_RUNNING_DEADLINE_EXCEEDED, f"{text}; attempt {last.number}: {last.message}")


def run(
    situation: Situation,
    job: FineTuneJob,
    attempt: Attempt,
    terms: Terms | None,
    deadline: datetime.datetime | None,
) -> Step:
    """The gang exists: is it queued, does it start, does it run?"""
    child, pods = situation.gang_of(attempt)
    # Nothing tells when a node stops answering; only the pod's deletion, and then time.
    lost = [pod.deletion + history.LOST_AFTER for pod in pods if pod.deletion and not pod.over]
    if attempt.start_time:
        text = f"attempt {attempt.number} runs on {_workers(job, child.workers)}"
        decision = Decision("Running", situation.with_warning(attempt, text))
        return Step(situation.stand(decision), due=(deadline, *lost))
    if child.suspended:
        text, look = _start_text(job, attempt), (attempt.creation_time or child.created) + ASK_QUEUE_FIRST
        if situation.now >= look:
            text, look = _queue_text(situation, text), situation.now + ASK_QUEUE
        step = Step(situation.stand(Decision("Queued", text)), due=(look,))
    else:
        text = f"attempt {attempt.number} starts {_workers(job, child.workers)}"
        step = with_trouble(situation, pods, "Starting", text)
    waited = capacity.waiting(situation.attempts)
    due = (*step.due, *lost, _returned_at(situation, job, attempt, terms))
    return within_pre_running(situation, job, waited.since if waited else child.created, replace(step, due=due))


def unadmitted(situation: Situation, attempt: Attempt) -> Situation | None:
    """The situation without the attempt, where somebody resumed its Job before its queue admitted it."""
    child, _ = situation.gang_of(attempt)
    queue = situation.observed.queue
    if child.suspended or queue is None or queue.admitted is not False:
        return None
    text = f"Job {child.name} was resumed, and queue {child.queue} has not admitted it ({queue.text}); it is stopped"
    # It costs an attempt: whoever resumes the next one as well does not go on for ever.
    stopped = history.close(attempt, Reason.PREEMPTED, text, situation.now, "Retryable")
    return replace(situation, attempts=(*situation.attempts[:-1], stopped))


def give_back(situation: Situation, job: FineTuneJob, attempt: Attempt, terms: Terms | None) -> Situation | None:
    """The situation without the attempt that has not found room for all of its gang, where it is time for that."""
    due = _returned_at(situation, job, attempt, terms)
    if due is None:
        return None
    child, pods = situation.gang_of(attempt)
    found, waited = capacity.seats(child, pods), capacity.waiting(situation.attempts)
    least, seconds = job.spec.distribution.min_workers, job.spec.run_policy.pre_running_deadline_seconds
    expires = _expires(situation, job, waited.since) if waited else None
    if expires and situation.now >= expires:
        if least is None or found.placed < least:
            return None  # nothing is left but the end, which `run` tells
        why = f"within {seconds} preRunningDeadlineSeconds"
    elif situation.now >= due and terms:
        why = f"within {terms.scheduling_grace_seconds} s"
        why += ", away from the nodes that failed" if child.selective else ""
    else:
        return None
    returned = capacity.give_back(attempt, found, why, situation.now)
    return replace(situation, attempts=(*situation.attempts[:-1], returned))


def _returned_at(
    situation: Situation, job: FineTuneJob, attempt: Attempt, terms: Terms | None
) -> datetime.datetime | None:
    """When the attempt will have held a part of what it needs for long enough."""
    child, pods = situation.gang_of(attempt)
    found = capacity.seats(child, pods)
    # One that refuses nodes may find no room at all because of that; otherwise what holds nothing may wait.
    since = found.since or (child.created if child.selective else None)
    if since is None or terms is None or found.placed == found.of:
        return None
    if attempt.start_time or child.suspended or _queue(job):
        return None
    return _grace_of(terms, since)


def _expires(situation: Situation, job: FineTuneJob, since: datetime.datetime) -> datetime.datetime | None:
    return situation.expires(since, job.spec.run_policy.pre_running_deadline_seconds)


def _grace_of(terms: Terms, since: datetime.datetime) -> datetime.datetime:
    return since + datetime.timedelta(seconds=terms.scheduling_grace_seconds)


def _lingering(situation: Situation, following: Attempt) -> list[str]:
    """Pods that may still write, of former attempts or of a Job that was not recorded: the next attempt waits for them,
    but not for those of a lost node, nor for its own if its Job is there already."""
    own = {child.uid for child in situation.observed.strays if child.name == following.job}
    pods = (pod for pod in situation.observed.pods if pod.owner not in own)
    return [pod.name for pod in pods if not pod.over and not history.is_lost(pod, situation.now)]


def _queue(job: FineTuneJob) -> str | None:
    return job.spec.queue.name if job.spec.queue else None


def _start_text(job: FineTuneJob, attempt: Attempt) -> str:
    if queue := _queue(job):
        return f"attempt {attempt.number} waits for queue {queue}"
    return f"attempt {attempt.number} starts {_workers(job, attempt.workers or job.spec.distribution.workers)}"


def _queue_text(situation: Situation, text: str) -> str:
    """With what the queue says; where it was not asked, with what it said the last time."""
    said, before = situation.observed.queue, situation.subject.status.message or ""
    if said is None:
        return before if before.startswith(f"{text}: ") else text
    return f"{text}: {said.text}"


def _workers(job: FineTuneJob, count: int) -> str:
    wanted = job.spec.distribution.workers
    few = f", of {wanted} that are wanted" if count < wanted else ""
    return ("one worker" if count == 1 else f"{count} workers") + few


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
