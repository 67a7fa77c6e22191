"""Following a job to its end: a progress bar where a terminal looks on, else one line for each change."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from datetime import datetime
from types import TracebackType
from typing import Self

from finetune_cli import jobview
from finetune_cli.cluster import JOBS, Cluster
from finetune_cli.errors import CliError
from finetune_cli.jobview import Snapshot
from finetune_sandbox.client import Object


async def until(
    cluster: Cluster, name: str, done: Callable[[Object], bool], show: Callable[[Snapshot], None]
) -> Object:
    """Watches a job until `done`, through broken connections; the job as it was then. Raises CliError if it goes."""
    job = await cluster.job(name)
    uid = job["metadata"]["uid"]
    show(jobview.snapshot(job))
    if done(job):
        return job
    async with aclosing(cluster.changes(JOBS, cluster.namespace, fields=f"metadata.name={name}")) as changes:
        async for change in changes:
            if change.type == "SYNCED":
                continue
            if change.type == "DELETED" or change.object["metadata"]["uid"] != uid:
                raise CliError(f"the job {name} was deleted")
            show(jobview.snapshot(change.object))
            if done(change.object):
                return change.object
    raise CliError(f"the watch of {name} ended")


class Lines:
    """For a log file or a pipe: a line for each change, with the time."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, snapshot: Snapshot) -> None:
        text = snapshot.text()
        if text != self._last:
            self._last = text
            print(f"{datetime.now():%H:%M:%S}  {text}", flush=True)


class Bar:
    """For a terminal: one line of progress, and a line of its own for each state that is left behind."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("[bold]{task.fields[state]}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
        )
        self._task = self._progress.add_task("", total=None, state="Pending", detail="")
        self._state = ""

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, traceback)

    def __call__(self, snapshot: Snapshot) -> None:
        if snapshot.state != self._state:
            self._state = snapshot.state
            self._progress.console.print(f"{datetime.now():%H:%M:%S}  {snapshot.text()}", markup=False, highlight=False)
        detail = snapshot.text().removeprefix(snapshot.state).strip()
        known = snapshot.step is not None and snapshot.total
        self._progress.update(
            self._task,
            state=snapshot.state,
            detail=detail,
            total=snapshot.total if known else None,
            completed=snapshot.step if known else 0,
        )


def shown(quiet: bool = False) -> AbstractContextManager[Callable[[Snapshot], None]]:
    """What fits where the output goes."""
    if quiet:
        return nullcontext(lambda _: None)
    return Bar() if sys.stdout.isatty() else Lines()
