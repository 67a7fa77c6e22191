"""Writes what trainers reported: one patch of status.trainerStatus in some seconds for each job, and nothing else."""

import asyncio
import datetime
import logging
from collections.abc import Callable

from pydantic import ValidationError

from finetune_api.progress import TrainerStatus
from finetune_operator.cluster import ApiError
from finetune_operator.metrics import Metrics
from finetune_operator.progress_auth import Object, ProgressCluster, Refused, current_attempt
from finetune_operator.progress_state import JobKey, ProgressBook, Write, merge

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0
"""How often jobs that fell silent are looked for while nothing is written."""
CONCURRENT_WRITES = 8
CONFLICTS = 5
"""How often a job that changed since it was read is read again before the write counts as failed."""
# The server found fault with what was written; it will again.
HOPELESS = (400, 413, 422)


class ProgressWriter:
    """`run` until cancelled, then `drain`. `monotonic`: seconds; `call_seconds`: limit for one write."""

    def __init__(
        self,
        cluster: ProgressCluster,
        book: ProgressBook,
        metrics: Metrics,
        *,
        monotonic: Callable[[], float],
        call_seconds: float,
    ) -> None:
        self._cluster, self._book, self._metrics = cluster, book, metrics
        self._monotonic, self._call_seconds = monotonic, call_seconds
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(CONCURRENT_WRITES)
        self._writes: set[asyncio.Task[None]] = set()

    def accept(self, key: JobKey, uid: str, attempt: int, report: TrainerStatus) -> None:
        """Notes a report that is to be written."""
        self._book.accept(key, uid, attempt, report, self._monotonic())
        self._wake.set()

    def forget(self, key: JobKey) -> None:
        self._book.forget(key)

    async def run(self) -> None:
        while True:
            for write in self._book.due(self._monotonic()):
                task = asyncio.create_task(self._write(write))
                self._writes.add(task)
                task.add_done_callback(self._writes.discard)
            self._wake.clear()
            due = self._book.next_due()
            wait = SWEEP_SECONDS if due is None else min(SWEEP_SECONDS, max(0.0, due - self._monotonic()))
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def drain(self) -> None:
        """Writes at once what waits; each is tried once."""
        self._book.hasten(self._monotonic())
        await asyncio.gather(*self._writes, *(self._write(write) for write in self._book.due(self._monotonic())))

    async def _write(self, write: Write) -> None:
        try:
            async with self._slots, asyncio.timeout(self._call_seconds):
                alive = await self._patch(write)
        except (ApiError, TimeoutError) as error:
            if isinstance(error, ApiError) and error.status in HOPELESS:
                logger.error("progress was refused and is dropped: %s", error, extra=_about(write.key))
                self._settle(write, "dropped", forget=True)
            else:
                self._retry(write, error)
        except Exception as error:
            logger.exception("progress could not be written", extra=_about(write.key))
            self._retry(write, error)
        else:
            self._settle(write, "written" if alive is not None else "dropped", forget=not alive)
        self._wake.set()

    def _retry(self, write: Write, error: Exception) -> None:
        self._metrics.progress_write("failed")
        wait = self._book.failed(write, self._monotonic())
        reason = str(error) or f"no answer in {self._call_seconds} s"
        logger.warning("progress is written again in %.0f s: %s", wait, reason, extra=_about(write.key))

    def _settle(self, write: Write, result: str, *, forget: bool) -> None:
        self._metrics.progress_write(result)
        self._book.written(write, self._monotonic())
        if forget:
            self._book.forget(write.key, write.uid)

    async def _patch(self, write: Write) -> bool | None:
        """True: written; False: written, but the attempt is over; None: the job is gone, or a later attempt reports."""
        for _ in range(CONFLICTS):
            job = await self._cluster.get_job(*write.key)
            if job is None or job["metadata"]["uid"] != write.uid:
                return None
            before = stored(job)
            if before is not None and before.attempt is not None and before.attempt > write.attempt:
                return None
            patch = as_patch(over(before, write.status))
            # The version guards the UID too: kube-apiserver itself looks at none in a patch of a status.
            version = job["metadata"]["resourceVersion"]
            if await self._cluster.patch_trainer_status(*write.key, write.uid, patch, version):
                break
        else:
            raise ApiError(409, "Conflict", f"the job changed {CONFLICTS} times while its progress was written")
        try:
            return current_attempt(job).number == write.attempt
        except Refused:
            return False


def _about(key: JobKey) -> dict[str, str]:
    """Of a log line: the job that it is about."""
    return {"namespace": key.namespace, "job": key.name}


def stored(job: Object) -> TrainerStatus | None:
    """status.trainerStatus of a FineTuneJob; None where there is none, or it is somebody else's handiwork."""
    try:
        return TrainerStatus.model_validate((job.get("status") or {}).get("trainerStatus"))
    except ValidationError:
        return None


def over(before: TrainerStatus | None, status: TrainerStatus) -> TrainerStatus:
    """What to write over what another replica may have written meanwhile: the newer of the two prevails."""
    if before is not None and before.attempt == status.attempt and _time(before) > _time(status):
        return merge(status, before)
    return merge(before, status)


def _time(status: TrainerStatus) -> datetime.datetime:
    time = status.last_updated_time or datetime.datetime.min
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)


def as_patch(status: TrainerStatus) -> Object:
    """A merge patch that leaves exactly `status`: what is absent is null, so that the server removes it."""
    patch: Object = status.model_dump(mode="json", by_alias=True)
    return patch
