"""Gangs that do not find room as a whole, before a real API server; the test is its scheduler."""

import pytest

from finetune_operator.manifests import without
from support.api import idle_pod
from support.operating import GROUP, Scene
from support.waiting import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
async def impatient(scene: Scene) -> Scene:
    """With an operator, under a profile that gives half a gang two seconds."""
    path = f"{GROUP}/finetuneprofiles/{scene.profile}"
    (await scene.api.patch(path, {"spec": {"schedulingGraceSeconds": 2}})).must(200)
    await scene.operator.start()
    return scene


async def place_one(scene: Scene, job: str, workers: int) -> str:
    """The scheduler finds a node for worker 0 and none for the others. The path of that worker's pod."""
    first, *others = await scene.pods(job, workers)
    path, name = scene.path("pods", first["metadata"]["name"], "/api/v1"), first["metadata"]["name"]
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"name": "node-0"}}
    (await scene.api.create(f"{path}/binding", binding)).must(201)
    full = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}
    for pod in others:
        status = scene.path("pods", pod["metadata"]["name"], "/api/v1") + "/status"
        (await scene.api.patch(status, {"status": {"conditions": [full]}}, "strategic")).must(200)
    return path


async def test_half_a_gang_is_given_back(impatient: Scene) -> None:
    await impatient.submit(distribution={"workers": 2}, runPolicy={"maxAttempts": 1})
    await impatient.prepared()
    await impatient.reaches("Starting")
    await place_one(impatient, "j-0", 2)
    status = await impatient.reaches("Queued")
    [attempt] = status["attempts"]
    assert (attempt["outcome"], attempt["reason"], attempt["placed"]) == ("Preempted", "Unschedulable", 1)
    assert "1 of 2 workers found a node within 2 s" in status["message"]
    await eventually(impatient.jobs, "the gang to go", until=lambda jobs: jobs == ["j-prepare"])
    for kind in ("services", "configmaps"):
        left = await impatient.api.items(impatient.path(kind, api="/api/v1"), labelSelector="finetune.dev/attempt=0")
        assert left == []


async def test_fewer_workers_start_on_the_same_batch(impatient: Scene) -> None:
    policy = {"preRunningDeadlineSeconds": 4}
    path = f"{GROUP}/finetuneprofiles/{impatient.profile}"
    (await impatient.api.patch(path, {"spec": {"schedulingGraceSeconds": 60}})).must(200)
    await impatient.submit(distribution={"workers": 2, "minWorkers": 1}, runPolicy=policy)
    await impatient.prepared()
    before = (await impatient.reaches("Starting"))["sizing"]
    placed = await place_one(impatient, "j-0", 2)
    # Its kubelet ends it; no other worker starts before.
    await eventually(
        lambda: impatient.api.get(placed), "the end", until=lambda pod: "deletionTimestamp" in pod.body["metadata"]
    )
    assert await impatient.jobs() == ["j-prepare"]
    (await impatient.api.delete(placed, {"gracePeriodSeconds": 0})).must(200)
    await impatient.run("j-1")
    status = await impatient.reaches("Running")
    assert [(a["workers"], a.get("outcome")) for a in status["attempts"]] == [(2, "Preempted"), (1, None)]
    after = status["sizing"]
    batch = [sizing["microBatchSize"] * sizing["gradientAccumulation"] for sizing in (before, after)]
    assert batch == [8, 16]
    assert status["gpus"] == 1


@pytest.mark.parametrize("strictly", [True, False])
async def test_a_server_takes_the_nodes_that_are_avoided(scene: Scene, strictly: bool) -> None:
    pod = idle_pod("p")
    pod["spec"]["affinity"] = without(["node-0", "node-1"], strictly=strictly)
    made = (await scene.api.create(scene.path("pods", api="/api/v1"), pod)).must(201)
    assert made["spec"]["affinity"] == pod["spec"]["affinity"]
