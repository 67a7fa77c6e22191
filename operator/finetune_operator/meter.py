"""PURE. GPU-seconds by profile and namespace: what attempts took since it was last counted.

Everything up to a time is counted once, and then known by that sum alone; so neither a restart nor a job that is
deleted changes what was spent.
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pydantic import ValidationError

from finetune_api.bounds import MOST
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
    key = str(raw["metadata"]["namespace"]), str(raw["metadata"]["name"])
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
    last, trainer = status.attempts[-1] if status.attempts else None, status.trainer_status
    if last and trainer and trainer.attempt == last.number and trainer.estimated_remaining_seconds is not None:
        return trainer.estimated_remaining_seconds * (last.gpus or 0) / HOUR
    return status.sizing.estimated_gpu_hours if status.sizing else None


def by_namespace(known: Iterable[str], spans: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each namespace that is known or has some."""
    found: dict[str, list[Run]] = {namespace: [] for namespace in known}
    for run in spans:
        found.setdefault(run.key[0], []).append(run)
    return found


def count(
    known: Mapping[str, Usage], budget: Budget, spans: Iterable[Run], now: datetime.datetime
) -> dict[str, Usage | None]:
    """What has changed of a profile's status.usage; None: it is of an earlier period, and goes."""
    changed = ((name, change(known.get(name), budget, own, now)) for name, own in by_namespace(known, spans).items())
    return {name: usage for name, (new, usage) in changed if new}


def change(
    known: Usage | None, budget: Budget, own: Sequence[Run], now: datetime.datetime
) -> tuple[bool, Usage | None]:
    """True where a namespace's usage has changed, and what it is then (None: nothing).

    A figure that the API server would not take is MOST: the budget is spent long before.
    """
    before = current(known, budget, now)
    added = sum(run.seconds(before.until, now) for run in own)
    left = min(MOST, round(HOUR * sum(run.expected for run in own)))
    if added or left != before.expected_gpu_seconds:
        spent = min(MOST, before.gpu_seconds + added)
        return True, Usage(since=before.since, until=now, gpu_seconds=spent, expected_gpu_seconds=left)
    return known is not None and known.since != before.since, None


def clamped(usage: Usage | None) -> bool:
    """True where a figure is as large as a status holds."""
    return usage is not None and MOST in (usage.gpu_seconds, usage.expected_gpu_seconds)


def with_usage(profile: FineTuneProfile, changed: Mapping[str, Usage | None]) -> FineTuneProfile:
    """The profile as it is once that is written."""
    usage = {name: value for name, value in {**profile.status.usage, **changed}.items() if value}
    return profile.model_copy(update={"status": profile.status.model_copy(update={"usage": usage})})
