"""The running controller, without kopf: a queue of keys, the workers, the servers beside it, and how it feels."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

from finetune_operator.cluster import ApiError, KubeCluster, load_configuration
from finetune_operator.manifests import JOB_LABEL, Context
from finetune_operator.metrics import Metrics, MetricsServer
from finetune_operator.progress import ProgressOptions, ProgressServer
from finetune_operator.reconcile import Key, NotYet, reconcile
from finetune_operator.settings import Settings, operator_version
from finetune_operator.tls import TlsError
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger("finetune_operator.controller")
Object = Mapping[str, Any]


class Controller:
    """`start` it, tell it of watch events, `stop` it."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.over = asyncio.Event()
        """The process is to end: it was told to stop, or a part of the controller ended that never should."""
        self.failure: str | None = None
        """Why it ended by itself."""
        self._clock = clock
        self._queue: WorkQueue[Key] = WorkQueue(self._work, on_failure=self._failure)
        self._seen: dict[Key, int] = {}
        self._stack = AsyncExitStack()
        self._heard: float | None = None
        self._listed = False

    async def start(self) -> None:
        """Raises ApiError where the API server does not answer or does not know our kinds, TlsError, OSError."""
        try:
            await self._start()
        except Exception as error:
            self.failure = f"cannot start: {error}"
            await self.stop()
            raise

    async def _start(self) -> None:
        configuration = await load_configuration()
        self._cluster = KubeCluster(configuration, timeout=self.settings.api_timeout_seconds, on_call=self._on_call)
        self._stack.push_async_callback(self._cluster.close)
        await self._resync()
        await self._start_servers()
        self.metrics.queue_depth.set_function(lambda: len(self._queue))
        for name, work in (("queue", self._queue.run(self.settings.workers)), ("resync", self._resync_forever())):
            task = asyncio.create_task(work, name=name)
            task.add_done_callback(self._ended)
            self._stack.push_async_callback(_cancel, task)

    async def stop(self) -> None:
        # kopf waits some seconds for its own task that waits for this flag, even where a signal ended it.
        self.over.set()
        await self._stack.aclose()

    def on_job(self, kind: str | None, raw: Object) -> None:
        """A watch event of a FineTuneJob; `kind` is DELETED, or anything else."""
        key = raw["metadata"]["namespace"], raw["metadata"]["name"]
        seen = None if kind == "DELETED" else fingerprint(raw)
        if seen is None:
            self._seen.pop(key, None)
        elif self._seen.get(key) == seen:
            return  # Progress alone: it comes every few seconds and changes nothing that is decided here.
        else:
            self._seen[key] = seen
        self._add(key)

    def on_child(self, raw: Object) -> None:
        """A watch event of a Job or a pod."""
        if name := (raw["metadata"].get("labels") or {}).get(JOB_LABEL):
            self._add((raw["metadata"]["namespace"], name))

    def problem(self) -> str | None:
        """Why the probe should fail; None while all is well."""
        if not self._listed or self._heard is None:
            return "the first LIST is not done"
        silence = self._clock() - self._heard
        if silence > self.settings.stale_seconds:
            return f"the API server has not answered for {silence:.0f} s"
        return None

    def _add(self, key: Key) -> None:
        self.metrics.queue_adds.inc()
        self._queue.add(key)

    async def _work(self, key: Key) -> float | None:
        start = self._clock()
        try:
            after, state = await reconcile(self._cluster, key, self._context)
        except Exception as error:
            self.metrics.reconciled(self._clock() - start, error)
            raise
        self.metrics.reconciled(self._clock() - start)
        self.metrics.job_state(key, state)
        return after

    def _failure(self, key: Key, error: Exception) -> None:
        self.metrics.queue_retries.inc()
        extra = {"namespace": key[0], "job": key[1]}
        if isinstance(error, NotYet):
            logger.info("not yet: %s", error, extra=extra)
            return
        # A refusal is one line; a mistake of ours needs its stack.
        stack = None if isinstance(error, ApiError) else error
        logger.warning("tried again later: %s", error or type(error).__name__, exc_info=stack, extra=extra)

    async def _resync_forever(self) -> None:
        while True:
            await asyncio.sleep(self.settings.resync_seconds)
            try:
                await self._resync()
                await self._read_authority()
            except (ApiError, TlsError, OSError) as error:
                logger.warning("resync failed: %s", error)

    async def _resync(self) -> None:
        """Puts every job on the queue that time or a lost event may have something in store for."""
        async for raw in self._cluster.list_jobs(self.settings.namespaces):
            if self._listed and _at_rest(raw):
                continue
            key = raw["metadata"]["namespace"], raw["metadata"]["name"]
            # Known by now: the watch begins with the same objects.
            self._seen[key] = fingerprint(raw)
            self._add(key)
        self._listed = True

    async def _start_servers(self) -> None:
        settings = self.settings
        host = urlsplit(settings.progress_url or "").hostname
        names = dict.fromkeys([*([host] if host else []), *settings.progress_hosts, "localhost", "127.0.0.1"])
        options = ProgressOptions(
            tls_folder=settings.tls_folder,
            hosts=tuple(names),
            host=settings.progress_host,
            port=settings.progress_port,
        )
        server = ProgressServer(self._cluster, options, self.metrics)
        await server.start()
        self._stack.push_async_callback(server.stop)
        self._progress_url = (settings.progress_url or f"https://127.0.0.1:{server.port}").rstrip("/")
        await self._read_authority()
        if settings.metrics_port is not None:
            metrics = MetricsServer(self.metrics, settings.metrics_host, settings.metrics_port)
            await self._stack.enter_async_context(metrics)

    async def _read_authority(self) -> None:
        """The folder's owner may renew it."""
        ca = await asyncio.to_thread((self.settings.tls_folder / "ca.crt").read_text)
        self._context = Context(self._progress_url, ca, operator_version())

    def _on_call(self, verb: str, resource: str, code: int | str, seconds: float) -> None:
        self.metrics.api_call(verb, resource, code, seconds)
        if isinstance(code, int) and code < 500:
            self._heard = self._clock()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            logger.error("%s ended, and with it the operator", task.get_name(), exc_info=task.exception())
            self.failure = f"{task.get_name()} ended"
            self.over.set()


def fingerprint(raw: Object) -> int:
    """Equal for two versions of a FineTuneJob between which nothing changed but how far its training is."""
    meta, status = raw["metadata"], dict(raw.get("status") or {})
    trainer = status.pop("trainerStatus", None) or {}
    said = [trainer.get(key) for key in ("attempt", "phase", "checkpoint")]
    # The UID: a job that was deleted and created anew. The annotations: whoever sets one is heard.
    known = [meta["uid"], meta.get("generation"), meta.get("deletionTimestamp"), meta.get("annotations"), status, said]
    return hash(json.dumps(known, sort_keys=True))


def _at_rest(raw: Object) -> bool:
    """Finished and without a ttl."""
    conditions = (raw.get("status") or {}).get("conditions") or ()
    over = any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)
    return over and "ttlSecondsAfterFinished" not in ((raw.get("spec") or {}).get("runPolicy") or {})


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
