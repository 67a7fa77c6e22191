"""The Job controller of a cluster that has none: watches Jobs and their pods, carries out what jobsync.py decides."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp

from finetune_sandbox.client import JOBS, JSON_PATCH, PODS, ApiError, Client, Object, Recorder
from finetune_sandbox.host import now
from finetune_sandbox.jobpods import FINALIZER
from finetune_sandbox.jobsync import CONTROLLER, Plan, sync
from finetune_sandbox.podstatus import TERMINAL
from finetune_sandbox.tasks import cancel, spawn

log = logging.getLogger(__name__)

JOB_NAME = "batch.kubernetes.io/job-name"
Key = tuple[str, str]
_RETRY_SECONDS, _RETRY_MAX_SECONDS = 0.2, 30.0
_CONCURRENCY = 8


class JobController:
    """`start()` it once per cluster; `close()` ends it. Every sync reads the Job and its pods live."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._recorder = Recorder(client, "job-controller", "", now)
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self._busy: dict[Key, asyncio.Task[None]] = {}
        self._dirty: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._refused: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [spawn(self._watch_jobs(), "Job watch"), spawn(self._watch_pods(), "watch of Jobs' pods")]

    async def close(self) -> None:
        await cancel([*self._tasks, *self._busy.values()])
        for timer in self._timers.values():
            timer.cancel()

    async def _watch_jobs(self) -> None:
        async for change in self._client.changes(JOBS):
            if change.object:
                metadata = change.object["metadata"]
                self._enqueue((metadata["namespace"], metadata["name"]))

    async def _watch_pods(self) -> None:
        async for change in self._client.changes(PODS, labels=JOB_NAME):
            if change.object:
                metadata = change.object["metadata"]
                self._enqueue((metadata["namespace"], metadata["labels"][JOB_NAME]))

    def _enqueue(self, key: Key) -> None:
        """One sync at a time per Job; what happens meanwhile leads to one more."""
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._busy:
            self._dirty.add(key)
        else:
            self._busy[key] = spawn(self._process(key), f"sync of Job {key[0]}/{key[1]}")

    async def _process(self, key: Key) -> None:
        try:
            while True:
                self._dirty.discard(key)
                delay = await self._attempt(key)
                if key not in self._dirty:
                    break
        finally:
            del self._busy[key]
        if delay is not None:
            self._timers[key] = asyncio.get_running_loop().call_later(max(delay, 0.01), self._enqueue, key)

    async def _attempt(self, key: Key) -> float | None:
        """Syncs once; the seconds until it must be tried or looked at again."""
        try:
            async with self._slots:
                delay = await self._sync(*key)
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            delay = min(_RETRY_SECONDS * 2.0**failures, _RETRY_MAX_SECONDS)
            level = logging.DEBUG if isinstance(error, ApiError) and error.status == 409 else logging.WARNING
            log.log(level, "Job %s/%s: %s; trying again in %.1f s", *key, error, delay)
            return delay
        self._failures.pop(key, None)
        return delay

    async def _sync(self, namespace: str, name: str) -> float | None:
        job = await self._get(namespace, name)
        pods, _ = await self._client.list(PODS, namespace, labels=f"{JOB_NAME}={name}")
        uid = job["metadata"]["uid"] if job else ""
        own = [pod for pod in pods if _owner(pod) == uid]
        for orphan in (pod for pod in pods if _owner(pod) != uid):
            await self._release(orphan)
        if job is None or job["spec"].get("managedBy", CONTROLLER) != CONTROLLER:
            return None
        for pod in own:
            await self._fail_unscheduled(pod)
        plan = sync(job, own, datetime.now(UTC))
        await self._apply(job, plan)
        return plan.requeue_after

    async def _get(self, namespace: str, name: str) -> Object | None:
        try:
            return await self._client.get(JOBS, namespace, name)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    async def _apply(self, job: Object, plan: Plan) -> None:
        """The status first: a pod may go only once it is counted. After a conflict (409) all is tried anew."""
        metadata = job["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        if plan.status is not None:
            await self._client.replace(JOBS, namespace, name, job | {"status": plan.status}, "status")
        await asyncio.gather(*(self._release(pod) for pod in plan.release))
        await asyncio.gather(*(self._delete_pod(job, pod) for pod in plan.delete))
        await asyncio.gather(*(self._create_pod(job, pod) for pod in plan.create))
        for notice in plan.notices:
            if notice.reason != "Unsupported" or metadata["uid"] not in self._refused:
                await self._recorder.event(job, JOBS, notice.type, notice.reason, notice.message)
            if notice.reason == "Unsupported":
                self._refused.add(metadata["uid"])
        if plan.delete_job:
            await self._client.delete(JOBS, namespace, name, uid=metadata["uid"], propagation="Foreground")

    async def _fail_unscheduled(self, pod: Mapping[str, Any]) -> None:
        """A pod that was deleted before it had a node: no kubelet will say that it failed.

        Elsewhere a garbage collector does; here it is done for the pods that would otherwise never be counted.
        """
        metadata = pod["metadata"]
        if not metadata.get("deletionTimestamp") or FINALIZER not in (metadata.get("finalizers") or []):
            return
        if not pod["spec"].get("nodeName") and pod["status"].get("phase") not in TERMINAL:
            body = {"metadata": {"uid": metadata["uid"]}, "status": {"phase": "Failed"}}
            await self._client.patch(PODS, metadata["namespace"], metadata["name"], body, "status")

    async def _release(self, pod: Mapping[str, Any]) -> None:
        """Takes our finalizer off, and only if it is still where it was seen."""
        metadata = pod["metadata"]
        finalizers = metadata.get("finalizers") or []
        if FINALIZER not in finalizers:
            return
        path = f"/metadata/finalizers/{finalizers.index(FINALIZER)}"
        operations = [
            {"op": "test", "path": "/metadata/uid", "value": metadata["uid"]},
            {"op": "test", "path": path, "value": FINALIZER},
            {"op": "remove", "path": path},
        ]
        try:
            await self._client.patch(PODS, metadata["namespace"], metadata["name"], operations, content_type=JSON_PATCH)
        except ApiError as error:
            if error.status != 404:
                raise

    async def _delete_pod(self, job: Object, pod: Mapping[str, Any]) -> None:
        metadata = pod["metadata"]
        await self._client.delete(PODS, metadata["namespace"], metadata["name"], uid=metadata["uid"])
        await self._recorder.event(job, JOBS, "Normal", "SuccessfulDelete", f"Deleted pod: {metadata['name']}")

    async def _create_pod(self, job: Object, pod: Object) -> None:
        try:
            made = await self._client.create(PODS, pod["metadata"]["namespace"], pod)
        except ApiError as error:
            await self._recorder.event(job, JOBS, "Warning", "FailedCreate", f"Error creating: {error.message}")
            raise
        name = made["metadata"]["name"]
        await self._recorder.event(job, JOBS, "Normal", "SuccessfulCreate", f"Created pod: {name}")


def _owner(pod: Object) -> str:
    owners = [o for o in pod["metadata"].get("ownerReferences") or [] if o.get("controller") and o["kind"] == "Job"]
    return str(owners[0]["uid"]) if owners else ""
