"""PURE. GPU-seconds by profile and namespace: what attempts took since it was last counted.

Everything up to a time is counted once, and then known by that sum alone; so neither a restart nor a job that is
deleted changes what was spent.
"""

import datetime
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from pydantic import ValidationError

from finetune_api.budget import HOUR, current
from finetune_api.jobstatus import Attempt, FineTuneJobStatus
from finetune_api.profile import Budget, FineTuneProfile, Usage
from finetune_operator.accept import Object

Key = tuple[str, str]


class Run(NamedTuple):
    """One attempt that held GPUs."""

    profile: str
    key: Key
    gpus: int
    start: datetime.datetime
    end: datetime.datetime | None
    expected: float = 0.0
    """GPU-hours that it is expected to take still."""

    def seconds(self, since: datetime.datetime, until: datetime.datetime) -> int:
        """GPU-seconds of it in a span."""
        begin, end = max(self.start, since), min(self.end or until, until)
        return self.gpus * max(0, int((end - begin).total_seconds()))


def runs(raw: Object) -> Iterator[Run]:
    """Of a FineTuneJob as the API server has it."""
    try:
        status = FineTuneJobStatus.model_validate(raw.get("status") or {})
    except ValidationError:
        return  # The reconcile says what is wrong with it.
    key = raw["metadata"]["namespace"], raw["metadata"]["name"]
    for attempt in status.attempts:
        run = run_of(key, attempt)
        if run and run.profile:
            yield run._replace(expected=expected(status) or 0.0) if run.end is None else run


def run_of(key: Key, attempt: Attempt) -> Run | None:
    """None where it never held any."""
    if not attempt.gpus or not attempt.start_time:
        return None
    end = attempt.completion_time or attempt.start_time if attempt.outcome else None
    return Run(attempt.profile or "", key, attempt.gpus, attempt.start_time, end)


def expected(status: FineTuneJobStatus) -> float | None:
    """GPU-hours that a running attempt takes still: by its own pace, else by the estimate; None: nobody knows."""
    last, trainer = status.attempts[-1], status.trainer_status
    if trainer and trainer.attempt == last.number and trainer.estimated_remaining_seconds is not None:
        return trainer.estimated_remaining_seconds * (last.gpus or 0) / HOUR
    return status.sizing.estimated_gpu_hours if status.sizing else None


def count(
    known: Mapping[str, Usage], budget: Budget, spans: Iterable[Run], now: datetime.datetime
) -> dict[str, Usage | None]:
    """What has changed of a profile's status.usage; None: it is of an earlier period, and goes."""
    by_namespace: dict[str, list[Run]] = defaultdict(list)
    for run in spans:
        by_namespace[run.key[0]].append(run)
    changed: dict[str, Usage | None] = {}
    for namespace in known.keys() | by_namespace.keys():
        before = current(known.get(namespace), budget, now)
        own = by_namespace[namespace]
        added = sum(run.seconds(before.until, now) for run in own)
        left = round(HOUR * sum(run.expected for run in own))
        if added or left != before.expected_gpu_seconds:
            spent = before.gpu_seconds + added
            changed[namespace] = Usage(since=before.since, until=now, gpu_seconds=spent, expected_gpu_seconds=left)
        elif namespace in known and known[namespace].since != before.since:
            changed[namespace] = None
    return changed


def with_usage(profile: FineTuneProfile, changed: Mapping[str, Usage | None]) -> FineTuneProfile:
    """The profile as it is once that is written."""
    usage = {name: value for name, value in {**profile.status.usage, **changed}.items() if value}
    return profile.model_copy(update={"status": profile.status.model_copy(update={"usage": usage})})
