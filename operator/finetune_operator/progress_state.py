"""What the progress server knows, without I/O or clock: the ETA, the merge of reports, what is to be written."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from finetune_api.bounds import MOST
from finetune_api.progress import Metric, TrainerStatus

MAX_METRICS = 64
MAX_SAMPLES = 32
"""Steps that the ETA looks back on: it follows a change of pace, and forgets the slow first steps."""
FIRST_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0


class Sample(NamedTuple):
    """A step that this attempt had completed at `time`, in seconds of a monotonic clock."""

    time: float
    step: int


class JobKey(NamedTuple):
    namespace: str
    name: str


def remaining_seconds(samples: Sequence[Sample], total_steps: int | None, now: float) -> int | None:
    """Seconds until `total_steps` at this attempt's own pace; None while the pace is unknown.

    Samples are in order of time, their steps increase. An attempt that resumed at step 900 is not credited with the
    first 900: its pace is that between its own samples.
    """
    if not samples or not total_steps:
        return None
    first, last = samples[0], samples[-1]
    left = total_steps - last.step
    if left <= 0:
        return 0
    if last.step <= first.step or last.time <= first.time:
        return None
    pace = (last.time - first.time) / (last.step - first.step)
    # What has passed since the last step is done; a step that takes longer than the others holds the clock, not more.
    return math.ceil(min(left * pace - min(now - last.time, pace), MOST))


def with_steps(report: TrainerStatus) -> TrainerStatus:
    """A stock Trainer's callback tells its steps as metrics: the same report with them where ours has them."""
    told = {metric.name: metric.value for metric in report.metrics}
    return report.model_copy(
        update={
            "step": report.step if report.step is not None else _count(told.get("current_step")),
            "total_steps": report.total_steps if report.total_steps is not None else _count(told.get("total_steps")),
        }
    )


def _count(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else None


def percentage(report: TrainerStatus) -> int | None:
    """As reported, else from the steps; 100 is for the trainer to say."""
    if report.progress_percentage is not None or report.step is None or not report.total_steps:
        return report.progress_percentage
    return min(99, 100 * report.step // report.total_steps)


def merge(before: TrainerStatus | None, after: TrainerStatus) -> TrainerStatus:
    """`after` told upon `before`: within an attempt progress never decreases and metrics are merged by name.

    Another attempt starts from nothing but the newest checkpoint, which outlives the attempt that made it.
    """
    if before is None:
        return after
    if before.attempt != after.attempt:
        return after.model_copy(update={"checkpoint": after.checkpoint or before.checkpoint})
    same_stage = after.stage is None or after.stage == before.stage
    return TrainerStatus.model_construct(
        progress_percentage=_most(before.progress_percentage, after.progress_percentage),
        estimated_remaining_seconds=_or(after.estimated_remaining_seconds, before.estimated_remaining_seconds),
        metrics=merge_metrics(before.metrics, after.metrics),
        last_updated_time=after.last_updated_time,
        phase=after.phase or before.phase,
        stage=after.stage or before.stage,
        step=_most(before.step, after.step) if same_stage else after.step,
        total_steps=_or(after.total_steps, before.total_steps) if same_stage else after.total_steps,
        attempt=after.attempt,
        checkpoint=after.checkpoint or before.checkpoint,
        warning=before.warning if same_stage and after.warning is None else after.warning,
    )


def merge_metrics(before: Sequence[Metric], after: Sequence[Metric]) -> list[Metric]:
    """The newest value of each name, in the order in which names appeared; of too many the oldest go."""
    names = {metric.name: metric for metric in (*before, *after)}
    told = {metric.name for metric in after}
    extra = max(0, len(names) - MAX_METRICS)
    forgotten = [name for name in names if name not in told][:extra]
    return [metric for name, metric in names.items() if name not in forgotten][:MAX_METRICS]


def _or(value: int | None, otherwise: int | None) -> int | None:
    return value if value is not None else otherwise


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)


@dataclass
class _Entry:
    """One running attempt that reports."""

    uid: str
    attempt: int
    seen: float
    status: TrainerStatus | None = None
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))
    due: float = 0.0
    dirty: bool = False
    writing: bool = False
    urgent: bool = False
    failures: int = 0


@dataclass(frozen=True)
class Write:
    """What is to be written now."""

    key: JobKey
    uid: str
    attempt: int
    status: TrainerStatus


class ProgressBook:
    """Reports in, writes out: one in `interval` seconds for a job, at once where a report is the first, the last or of
    a new phase. Holds what is not yet written, and the samples of attempts that reported in the last `idle` seconds."""

    def __init__(self, interval: float, idle: float = 600.0) -> None:
        self._interval, self._idle = interval, idle
        self._entries: dict[JobKey, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def accept(self, key: JobKey, uid: str, attempt: int, report: TrainerStatus, now: float) -> TrainerStatus:
        """Notes a report; `now` is monotonic. Returns what it amounts to."""
        entry = self._entries.get(key)
        if entry is None or (entry.uid, entry.attempt) != (uid, attempt):
            entry = self._entries[key] = _Entry(uid, attempt, seen=now, due=now)
        before, entry.seen = entry.status, now
        report = self._with_total(entry, with_steps(report))
        # What a stock Trainer estimates is wrong after a resume; it is believed only where no steps are told.
        eta = report.estimated_remaining_seconds
        if report.step is not None:
            if not entry.samples or report.step > entry.samples[-1].step:
                entry.samples.append(Sample(now, report.step))
            eta = remaining_seconds(entry.samples, report.total_steps, now)
        told = report.model_copy(
            update={
                "attempt": attempt,
                "progress_percentage": percentage(report),
                "estimated_remaining_seconds": eta,
            }
        )
        entry.status = merge(before, told)
        entry.dirty = True
        finished = told.progress_percentage == 100 and (before is None or before.progress_percentage != 100)
        if before is None or finished or told.phase not in (None, before.phase):
            entry.urgent = True
            if not entry.failures:
                entry.due = now
        return entry.status

    def _with_total(self, entry: _Entry, report: TrainerStatus) -> TrainerStatus:
        """The report with the total that was told before; another stage has its own, and its own pace."""
        before = entry.status
        if before is None or report.stage not in (None, before.stage):
            entry.samples.clear()
            return report
        return report.model_copy(update={"total_steps": _or(report.total_steps, before.total_steps)})

    def due(self, now: float) -> list[Write]:
        """The writes whose time has come; each is to be settled. Forgets jobs that have been silent for long."""
        for key in [k for k, e in self._entries.items() if self._silent(e, now)]:
            del self._entries[key]
        writes = []
        for key, entry in self._entries.items():
            if entry.dirty and not entry.writing and entry.due <= now and entry.status is not None:
                entry.writing, entry.dirty, entry.urgent = True, False, False
                writes.append(Write(key, entry.uid, entry.attempt, entry.status))
        return writes

    def _silent(self, entry: _Entry, now: float) -> bool:
        return not entry.dirty and not entry.writing and now - entry.seen > self._idle

    def next_due(self) -> float | None:
        """When `due` has something to return, on the clock of `now`; None = nothing waits."""
        return min((e.due for e in self._entries.values() if e.dirty and not e.writing), default=None)

    def written(self, write: Write, now: float) -> None:
        """The write succeeded: the next one is an interval away, unless something urgent came meanwhile."""
        if entry := self._settled(write):
            entry.failures = 0
            entry.due = now if entry.urgent else now + self._interval

    def failed(self, write: Write, now: float) -> float:
        """The write failed: it is due again, with what came meanwhile. Returns the seconds until then."""
        entry = self._settled(write)
        if entry is None:
            return 0.0
        wait: float = min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**entry.failures)
        entry.failures = min(entry.failures + 1, 10)
        entry.dirty, entry.due = True, now + wait
        return wait

    def _settled(self, write: Write) -> _Entry | None:
        entry = self._entries.get(write.key)
        if entry is None or (entry.uid, entry.attempt) != (write.uid, write.attempt):
            return None
        entry.writing = False
        return entry

    def forget(self, key: JobKey, uid: str | None = None) -> None:
        """Drops a job that ended or went; with `uid` only that one, not its successor of the same name."""
        entry = self._entries.get(key)
        if entry is not None and uid in (None, entry.uid):
            del self._entries[key]

    def hasten(self, now: float) -> None:
        """Everything that waits is due: the server goes."""
        for entry in self._entries.values():
            entry.due = min(entry.due, now)
