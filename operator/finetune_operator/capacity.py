"""PURE. Whether a gang finds room: when it gives back what it holds, and how large the next one is.

A scheduler binds the pods of a gang one by one. Two gangs of which each holds half of the nodes would wait for each
other for ever, on GPUs that nobody uses; so one that is not placed as a whole gives all of it back after a while.
"""

import datetime
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from finetune_api.failures import Reason
from finetune_api.job import FineTuneJob
from finetune_api.jobstatus import Attempt
from finetune_api.profile import FineTuneProfile
from finetune_api.run import PreparedSummary
from finetune_api.sizing import DoesNotFit
from finetune_operator.attempts import close
from finetune_operator.fitting import Fit, fit
from finetune_operator.observe import Child, Pod


class Seats(NamedTuple):
    """How far a gang is placed."""

    placed: int
    of: int
    since: datetime.datetime | None
    """When the first of its pods was bound to a node."""

    def __str__(self) -> str:
        return f"{self.placed} of {self.of} workers found a node"


class Wait(NamedTuple):
    """A gang of one size that was asked for, perhaps several times, and has not run."""

    since: datetime.datetime
    workers: int | None
    returned: int
    """How often it gave back what it held."""
    placed: int
    """Its workers that had found a node the last time."""


def seats(child: Child, pods: Sequence[Pod]) -> Seats:
    bound = {pod.index: pod.bound or pod.created for pod in pods if pod.node and not pod.over and not pod.deletion}
    return Seats(len(bound), child.workers, min(bound.values(), default=None))


def give_back(attempt: Attempt, found: Seats, why: str, now: datetime.datetime) -> Attempt:
    """The attempt as one that never ran: it costs nothing."""
    text = f"{found} {why}; what they held is given back"
    return close(attempt, Reason.UNSCHEDULABLE, text, now, "Preempted").model_copy(update={"placed": found.placed})


def was_given_back(attempt: Attempt) -> bool:
    return attempt.outcome == "Preempted" and attempt.reason == Reason.UNSCHEDULABLE


def waiting(attempts: Sequence[Attempt]) -> Wait | None:
    """What the newest attempts, of equal size, wait for; None where the newest one ran."""
    run: list[Attempt] = []
    for attempt in reversed(attempts):
        pending = attempt.outcome is None and attempt.start_time is None
        if not (pending or was_given_back(attempt)) or (run and attempt.workers != run[0].workers):
            break
        run.append(attempt)
    since = run[-1].creation_time or run[-1].completion_time if run else None
    if since is None:
        return None
    returned = [attempt for attempt in run if was_given_back(attempt)]
    return Wait(since, run[0].workers, len(returned), (returned[0].placed or 0) if returned else 0)


def fewer(
    job: FineTuneJob, profile: FineTuneProfile, prepared: PreparedSummary, attempts: Sequence[Attempt], waited: Wait
) -> tuple[int, Fit] | None:
    """The largest gang that found room and keeps the global batch; None where distribution.minWorkers allows none.

    Raises NothingSmaller.
    """
    least = job.spec.distribution.min_workers
    most = min(waited.placed, (waited.workers or job.spec.distribution.workers) - 1)
    for workers in range(most, (least or most + 1) - 1, -1):
        with suppress(DoesNotFit):
            return workers, fit(job, profile, prepared, attempts, workers)
    return None
