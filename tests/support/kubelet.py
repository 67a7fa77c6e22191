"""A namespace's pods, played: whatever `prepare` or gang is asked for runs and ends well."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from finetune_api.failures import TerminationMessage
from finetune_operator.manifests import ATTEMPT_LABEL, PREPARE
from finetune_operator.reconcile import utc_now
from support.api import Api, Object
from support.world import PREPARED, RESULT, rfc3339


@dataclass
class Kubelet:
    """`running` plays until its block ends."""

    api: Api
    namespace: str
    interval: float = 0.1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            playing = tasks.create_task(self._play())
            yield
            playing.cancel()

    async def _play(self) -> None:
        while True:
            pods = await self.api.items(f"/api/v1/namespaces/{self.namespace}/pods")
            await asyncio.gather(*(self._step(pod) for pod in pods))
            await asyncio.sleep(self.interval)

    async def _step(self, pod: Object) -> None:
        phase, meta = pod["status"]["phase"], pod["metadata"]
        if phase in ("Succeeded", "Failed") or "deletionTimestamp" in meta:
            return
        now = rfc3339(utc_now())
        if meta["labels"].get(ATTEMPT_LABEL) != PREPARE and phase == "Pending":
            await self._report(pod, "Running", {"running": {"startedAt": now}})
            return
        said = TerminationMessage(prepared=PREPARED, result=None)
        if meta["labels"].get(ATTEMPT_LABEL) != PREPARE:
            said = TerminationMessage(result=RESULT)
        ended = {"exitCode": 0, "startedAt": now, "finishedAt": now, "message": said.encode().decode()}
        await self._report(pod, "Succeeded", {"terminated": ended})

    async def _report(self, pod: Object, phase: str, state: Object) -> None:
        container = {"name": "trainer", "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": state}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/status"
        answer = await self.api.patch(path, {"status": {"phase": phase, "containerStatuses": [container]}}, "merge")
        assert answer.status in (200, 404, 409), answer
