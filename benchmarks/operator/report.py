"""What the benchmark measures, and how it is told."""

import json
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """Jobs created at once. Seconds and megabytes; `None`: the server does not count writes."""

    jobs: int
    jobs_per_second: float
    created_per_second: float
    """How fast the jobs themselves came in."""
    latency_p50: float
    """From a job's creation to its gang's Job, as a watch sees it."""
    latency_p99: float
    cpu_ms_per_job: float
    """Of the operator's (the loop's) process."""
    resident_mb: float
    writes_per_job: float | None
    events_per_job: float | None
    reads_per_job: float


@dataclass(frozen=True)
class Restart:
    """An operator that starts before jobs that need nothing."""

    jobs: int
    state: str
    seconds: float
    """From the process's start until every job was reconciled."""
    cpu_seconds: float
    resident_mb: float
    writes: int | None


def median(runs: list[Run]) -> Run:
    """Field by field."""
    values: dict[str, Any] = {}
    for each in fields(Run):
        found = [value for run in runs if (value := getattr(run, each.name)) is not None]
        values[each.name] = statistics.median(found) if found else None
    return Run(**values | {"jobs": runs[0].jobs})


def write(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    (folder / "results.md").write_text(markdown(results))


def markdown(results: dict[str, Any]) -> str:
    machine = results["machine"]
    rows = [
        "# Results",
        "",
        f"`{results['command']}` on {machine['cores']} cores ({machine['cpu']}), {machine['memoryGiB']} GiB, Python "
        f"{machine['python']}, against {results['server']}; {results['workers']} jobs worked on at a time.",
        "",
        "| jobs at once | | jobs/s | ratio | writes per job | Events per job | reads per job "
        "| create to children p50, p99 | CPU per job | RSS |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in results["runs"]:
        for who, name in (("operator", "operator"), ("bare", "bare loop")):
            run = entry[who]
            ratio = f"{entry['ratio']:.2f}" if who == "operator" else ""
            latency = f"{run['latency_p50']:.2f} s, {run['latency_p99']:.2f} s"
            requests = (number(run[f"{what}_per_job"]) for what in ("writes", "events", "reads"))
            rows.append(
                f"| {run['jobs']} | {name} | {run['jobs_per_second']:.1f} | {ratio} "
                f"| {' | '.join(requests)} | {latency} "
                f"| {run['cpu_ms_per_job']:.1f} ms | {run['resident_mb']:.0f} MB |"
            )
    rows += [
        "",
        "| operator starts before | all reconciled after | CPU | RSS | writes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for entry in results["restarts"]:
        writes = "not counted" if entry["writes"] is None else entry["writes"]
        rows.append(
            f"| {entry['jobs']} {entry['state']} jobs | {entry['seconds']:.1f} s | {entry['cpu_seconds']:.1f} s "
            f"| {entry['resident_mb']:.0f} MB | {writes} |"
        )
    return "\n".join(rows) + "\n"


def number(value: float | None) -> str:
    return "not counted" if value is None else f"{value:.1f}"
