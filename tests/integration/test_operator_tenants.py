"""Budgets and turns of tenants, before a real API server: the operator as a process, and what it writes."""

from dataclasses import replace

import pytest

from finetune_api.failures import TerminationMessage
from support import rights
from support.api import Object
from support.operating import GROUP, Scene
from support.waiting import eventually
from support.world import PREPARED

pytestmark = pytest.mark.integration


def profile_path(scene: Scene) -> str:
    return f"{GROUP}/finetuneprofiles/{scene.profile}"


async def usage(scene: Scene) -> Object:
    profile = (await scene.api.get(profile_path(scene))).must(200)
    found: Object = profile.get("status", {}).get("usage", {}).get(scene.namespace, {})
    return found


async def test_a_budget_is_counted_in_the_profile_and_ends_what_has_spent_it(scene: Scene) -> None:
    # Seven seconds of two processes.
    (await scene.api.patch(profile_path(scene), {"spec": {"budget": {"gpuHours": 14 / 3600}}})).must(200)
    await scene.operator.start(RESYNC_SECONDS="1")
    await scene.submit(distribution={"workers": 2})
    await scene.prepared()
    await scene.reaches("Starting")
    await scene.run("j-0", 2)
    await scene.reaches("Running")
    await eventually(lambda: usage(scene), "what it spends", until=lambda found: found.get("gpuSeconds", 0) > 0)
    status = await scene.reaches("Suspended")
    suspended = next(c for c in status["conditions"] if c["type"] == "Suspended")
    assert (suspended["status"], suspended["reason"]) == ("True", "BudgetExceeded")
    text = f"profile '{scene.profile}' gives namespace '{scene.namespace}' a budget for each month: "
    assert suspended["message"].startswith(text)
    assert " of 0.00389 GPU-hours are spent; " in suspended["message"]
    await eventually(scene.jobs, "the gang to go", until=lambda jobs: jobs == ["j-prepare"])
    # A new operator knows as much, and so does one whose job was deleted.
    await eventually(lambda: usage(scene), "all of it", until=lambda found: found.get("gpuSeconds", 0) >= 14)
    assert await scene.operator.stop() == 0
    (await scene.api.delete(scene.job_path(), {"propagationPolicy": "Background"})).must(200)
    await eventually(lambda: scene.api.get(scene.job_path()), "the job to go", until=lambda a: a.status == 404)
    await scene.operator.start(RESYNC_SECONDS="1")
    await scene.submit("k", distribution={"workers": 2})
    await scene.reaches("Preparing", "k")
    await scene.end("k-prepare", message=TerminationMessage(prepared=PREPARED))
    status = await scene.reaches("Suspended", "k")
    assert "attempts" not in status or status["attempts"] == []
    assert (await usage(scene))["gpuSeconds"] >= 14


async def test_a_namespace_runs_as_many_jobs_as_it_may_and_the_next_one_follows(scene: Scene) -> None:
    (await scene.api.patch(profile_path(scene), {"spec": {"concurrency": {"jobsPerNamespace": 1}}})).must(200)
    await scene.operator.start(RESYNC_SECONDS="3600")
    for name in ("j", "k"):
        await scene.submit(name)
        await scene.reaches("Preparing", name)
        await scene.end(f"{name}-prepare", message=TerminationMessage(prepared=PREPARED))
    status = await scene.reaches("Queued", "k")
    text = f"profile '{scene.profile}' lets namespace '{scene.namespace}' run 1 job at a time"
    assert status["message"] == f"attempt 0 waits for its turn: {text}"
    assert await scene.jobs() == ["j-0", "j-prepare", "k-prepare"]
    # Another operator knows who holds what.
    assert await scene.operator.stop() == 0
    await scene.operator.start(RESYNC_SECONDS="3600")
    await scene.run("j-0")
    await scene.reaches("Running")
    assert await scene.jobs() == ["j-0", "j-prepare", "k-prepare"]
    await scene.completed("j-0")
    await scene.reaches("Complete")
    await scene.reaches("Starting", "k")


async def test_a_gang_in_a_queue_says_what_kueue_says(scene: Scene) -> None:
    await scene.operator.start(RESYNC_SECONDS="1")
    await scene.submit(queue={"name": "q"})
    await scene.prepared()
    status = await scene.reaches("Queued")

    def says(text: str) -> object:
        return eventually(scene.status, text, until=lambda s: text in s.get("message", ""), timeout=30)

    gang = (await scene.api.get(scene.path("jobs", "j-0"))).must(200)
    assert gang["spec"]["suspend"] is True
    await says("attempt 0 waits for queue q: the API server knows no Workloads; Kueue is not installed")
    path = scene.path("workloads", api="/apis/kueue.x-k8s.io/v1beta1")
    full = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": "8 more needed"}
    workload = {
        "apiVersion": "kueue.x-k8s.io/v1beta1",
        "kind": "Workload",
        "metadata": {"name": "job-j-0-12345", "labels": {"kueue.x-k8s.io/job-uid": gang["metadata"]["uid"]}},
        "spec": {"active": True},
        "status": {"conditions": [full]},
    }
    async with rights.kueue(scene.api):
        (await scene.api.create(path, workload)).must(201)
        # Whoever touches the job is heard at once; else the queue is asked once a minute.
        (await scene.api.patch(scene.job_path(), {"metadata": {"annotations": {"look": "again"}}})).must(200)
        await says("attempt 0 waits for queue q: no quota yet: 8 more needed")
        admitted = {"status": {"conditions": [{"type": "Admitted", "status": "True"}]}}
        (await scene.api.patch(f"{path}/{workload['metadata']['name']}", admitted)).must(200)
        (await scene.api.patch(scene.path("jobs", "j-0"), {"spec": {"suspend": False}})).must(200)
        await scene.run("j-0")
        status = await scene.reaches("Running")
        assert status["attempts"][0]["startTime"]


async def test_jobs_of_an_excluded_namespace_are_left_alone(scene: Scene) -> None:
    other = replace(scene, namespace=f"{scene.namespace}-system")
    (await scene.api.create("/api/v1/namespaces", {"metadata": {"name": other.namespace}})).must(201)
    try:
        await other.submit("before")
        names = {"NAMESPACES": f"{scene.namespace} {other.namespace}", "EXCLUDED_NAMESPACES": other.namespace}
        await scene.operator.start(**names, RESYNC_SECONDS="1")
        await scene.submit("first")
        await scene.reaches("Preparing", "first")
        await other.submit("after")
        # Later than its own: what it makes of this one it would have made of those by then.
        await scene.submit("second")
        await scene.reaches("Preparing", "second")
        assert [await other.status(name) for name in ("before", "after")] == [{}, {}]
        assert await other.jobs() == []
        assert not [write for write in scene.proxy.writes if other.namespace in write]
    finally:
        await scene.api.delete(f"/api/v1/namespaces/{other.namespace}")
