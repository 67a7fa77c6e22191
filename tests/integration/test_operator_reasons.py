"""Ends that a job comes to by what the API server says of its profile, its pods and its time; one operator for all."""

from typing import Any

import pytest

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage
from support.api import Object
from support.operating import GROUP, Scene
from support.waiting import eventually
from support.world import PREPARED

pytestmark = pytest.mark.integration


async def comes_to(scene: Scene, name: str, kind: str, reason: Reason) -> str:
    """The message of the job's condition of this kind, once it has the reason."""

    def condition(status: Object) -> Object:
        found = [c for c in status.get("conditions") or () if c["type"] == kind and c["reason"] == reason.value]
        return found[0] if found else {}

    status = await eventually(
        lambda: scene.status(name), f"{kind} of {name} with {reason.value}", until=condition, timeout=60
    )
    return str(condition(status)["message"])


async def killed(scene: Scene, job: str, state: dict[str, Any]) -> None:
    (pod,) = await scene.pods(job)
    await scene.report(pod, "Failed", {"terminated": state})


async def prepared(scene: Scene, name: str) -> None:
    await scene.end(f"{name}-prepare", message=TerminationMessage(prepared=PREPARED))


async def test_every_end_has_its_reason(scene: Scene) -> None:
    path = f"{GROUP}/finetuneprofiles/{scene.profile}"
    (await scene.api.patch(path, {"spec": {"limits": {"maxWorkers": 2}}})).must(200)
    await scene.operator.start()
    await scene.submit("many", distribution={"workers": 4})
    await scene.submit("nowhere", profile="no-such-profile")
    await scene.submit("late", runPolicy={"preRunningDeadlineSeconds": 1})
    await scene.submit("no-image")
    await scene.submit("gpu", training={"maxSteps": 8, "globalBatchSize": 8, "microBatchSize": 1})
    await scene.submit("host")

    (pod,) = await scene.pods("no-image-prepare")
    await scene.report(pod, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}})
    for name in ("gpu", "host"):
        await prepared(scene, name)
    said = TerminationMessage(reason=Reason.OUT_OF_MEMORY, message="the GPU's memory is exhausted", rank=0)
    await scene.end("gpu-0", message=said, code=EXIT_CODES[Reason.OUT_OF_MEMORY])
    await killed(scene, "host-0", {"exitCode": 137, "reason": "OOMKilled"})

    assert "allows at most 2" in await comes_to(scene, "many", "Accepted", Reason.NOT_ALLOWED_BY_PROFILE)
    assert "no-such-profile" in await comes_to(scene, "nowhere", "Accepted", Reason.PROFILE_NOT_FOUND)
    text = await comes_to(scene, "late", "Failed", Reason.PRE_RUNNING_DEADLINE_EXCEEDED)
    assert "1 preRunningDeadlineSeconds" in text
    text = await comes_to(scene, "gpu", "Failed", Reason.OUT_OF_MEMORY)
    assert "its micro-batch is 1 already" in text
    text = await comes_to(scene, "host", "Failed", Reason.HOST_OUT_OF_MEMORY)
    assert "spec.resources.memory must be larger" in text
    text = await comes_to(scene, "no-image", "Running", Reason.IMAGE_PULL_ERROR)
    assert "ImagePullBackOff: no such image" in text

    # None of these is tried again.
    assert not {"gpu-1", "host-1", "many-prepare", "nowhere-prepare"} & set(await scene.jobs())
