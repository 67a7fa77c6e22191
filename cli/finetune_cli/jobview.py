"""A FineTuneJob as people read it. Pure: the object and the time in, text out.

Objects are read as the server sends them: an older or newer operator's status must not stop anybody from seeing it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.printable import printable

Object = Mapping[str, Any]
FINISHED = ("Complete", "Failed")
DEFAULT = "(default)"
"""Of what a user has not said: the profile's, or the API's."""


@dataclass(frozen=True)
class Snapshot:
    """What changes while a job runs."""

    state: str
    message: str
    attempt: int
    percent: int | None = None
    step: int | None = None
    total: int | None = None
    loss: str | None = None
    eta: int | None = None

    def text(self) -> str:
        """`Running  step 40/250 (16 %)  loss 3.214  ETA 42s`"""
        parts = [self.state]
        if self.attempt > 0:
            parts.append(f"attempt {self.attempt + 1}")
        if self.state not in FINISHED:
            if self.step is not None and self.total:
                parts.append(f"step {self.step}/{self.total}")
            if self.percent is not None:
                parts.append(f"({self.percent} %)")
            if self.loss is not None:
                parts.append(f"loss {self.loss}")
            if self.eta is not None:
                parts.append(f"ETA {duration(self.eta)}")
        if self.message and (self.step is None or self.state in FINISHED):
            parts.append(self.message)
        return printable("  ".join(parts))


def status(job: Object) -> Object:
    return job.get("status") or {}


def condition(job: Object, kind: str) -> Object | None:
    return next((c for c in status(job).get("conditions") or () if c.get("type") == kind), None)


def outcome(job: Object) -> str | None:
    """`Complete` or `Failed` once that is certain."""
    return next((kind for kind in FINISHED if (condition(job, kind) or {}).get("status") == "True"), None)


def snapshot(job: Object) -> Snapshot:
    now = status(job)
    trainer = now.get("trainerStatus") or {}
    attempts = now.get("attempts") or ()
    running = now.get("state") in ("Running", "Evaluating", "Publishing")
    number = attempts[-1].get("number", 0) if attempts else 0
    if not running or trainer.get("attempt", number) != number:
        return Snapshot(now.get("state") or "Pending", now.get("message") or "", number)
    return Snapshot(
        state=now["state"],
        message=now.get("message") or "",
        attempt=number,
        percent=trainer.get("progressPercentage"),
        step=trainer.get("step"),
        total=trainer.get("totalSteps"),
        loss=metric(trainer, "loss"),
        eta=trainer.get("estimatedRemainingSeconds"),
    )


def metric(trainer: Object, name: str) -> str | None:
    """A metric's value, shortened to four digits where it is a number."""
    value = next((m.get("value") for m in trainer.get("metrics") or () if m.get("name") == name), None)
    return None if value is None else number(value)


def number(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


def duration(seconds: float) -> str:
    """`42s`, `3m10s`, `2h05m`, `4d`."""
    total = int(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 48 * 3600:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d"


def age(job: Object, now: datetime) -> str:
    created = job.get("metadata", {}).get("creationTimestamp")
    return duration(max(0.0, (now - moment(created)).total_seconds())) if created else ""


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def table(rows: Iterable[Sequence[Any]]) -> list[str]:
    """Columns as wide as their widest cell, three spaces apart, as kubectl prints them."""
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    return ["   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def job_rows(jobs: Iterable[Object], now: datetime, with_namespace: bool) -> list[list[Any]]:
    header = ["NAME", "STATE", "PROGRESS", "LOSS", "ETA", "ATTEMPTS", "AGE"]
    rows: list[list[Any]] = [(["NAMESPACE"] if with_namespace else []) + header]
    for job in jobs:
        meta, seen = job["metadata"], snapshot(job)
        percent = 100 if seen.state == "Complete" else seen.percent
        rows.append(
            ([meta.get("namespace", "")] if with_namespace else [])
            + [
                meta["name"],
                seen.state,
                f"{percent} %" if percent is not None else None,
                seen.loss,
                duration(seen.eta) if seen.eta is not None else None,
                attempts(job),
                age(job, now),
            ]
        )
    return rows


def attempts(job: Object) -> int:
    """How often the gang was started."""
    count = status(job).get("attemptCount")
    return int(count) if count is not None else len(status(job).get("attempts") or ())


def describe(job: Object, now: datetime) -> list[str]:
    """`finetune get`: what a person asks of one job."""
    meta, spec, seen = job["metadata"], job.get("spec") or {}, snapshot(job)
    distribution = spec.get("distribution") or {}
    lines = [
        f"{meta.get('namespace', '')}/{meta['name']}: {seen.text()}",
        "",
        *table(
            [
                ["Base model", (spec.get("baseModel") or {}).get("uri")],
                ["Datasets", ", ".join(d.get("uri", "") for d in spec.get("datasets") or ())],
                ["Method", " / ".join((spec.get(part) or {}).get("type") or DEFAULT for part in ("method", "tuning"))],
                ["Workers", " x ".join(str(distribution.get(part, DEFAULT)) for part in ("workers", "gpusPerWorker"))],
                ["Profile", spec.get("profile") or DEFAULT],
                ["Age", age(job, now)],
            ]
        ),
    ]
    for title, rows in (("Conditions", _conditions(job, now)), ("Attempts", _attempts(job))):
        if len(rows) > 1:
            lines += ["", f"{title}:", *(f"  {line}" for line in table(rows))]
    if status(job).get("result"):
        lines += ["", *result(job)]
    return lines


def _conditions(job: Object, now: datetime) -> list[list[Any]]:
    rows: list[list[Any]] = [["TYPE", "STATUS", "REASON", "SINCE", "MESSAGE"]]
    for entry in status(job).get("conditions") or ():
        changed = entry.get("lastTransitionTime")
        since = duration(max(0.0, (now - moment(changed)).total_seconds())) if changed else ""
        rows.append([entry.get("type"), entry.get("status"), entry.get("reason"), since, entry.get("message")])
    return rows


def _attempts(job: Object) -> list[list[Any]]:
    rows: list[list[Any]] = [["NUMBER", "OUTCOME", "REASON", "EXIT", "RANK", "RESUMED FROM", "MESSAGE"]]
    for entry in status(job).get("attempts") or ():
        fields = ("number", "outcome", "reason", "exitCode", "rank", "resumedFromStep", "message")
        rows.append([entry.get(field) for field in fields])
    return rows


def result(job: Object) -> list[str]:
    """How a finished job ended: for a Failed one the reason; where something was published, its URI and the metrics."""
    name, ended = job["metadata"]["name"], outcome(job)
    count = attempts(job)
    tries = f"{count} attempt{'' if count == 1 else 's'}"
    published = status(job).get("result") or {}
    lines = [f"{name} is complete after {tries}"] if ended else []
    if ended == "Failed":
        why = condition(job, "Failed") or {}
        lines = [printable(f"{name} failed after {tries}: {why.get('reason')}: {why.get('message')}")]
        if not published:
            return lines
        lines += ["what it published is kept:"]
    metrics = published.get("metrics") or {}
    lines += table(
        [
            ["Adapter", published.get("uri")],
            ["Manifest", f"sha256:{published.get('manifestSHA256')}"],
            ["Size", size(published.get("sizeBytes") or 0)],
            *([key, number(value)] for key, value in sorted(metrics.items())),
        ]
    )
    return lines


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
