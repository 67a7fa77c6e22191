"""The same name with a new UID, somebody else's object, another's hand between a read and the write that follows it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

from finetune_api.failures import Reason
from support.api import Object
from support.faulty import FaultyProxy, Meanwhile, Rule
from support.operating import Scene
from support.playing import nudged
from support.scenarios import (
    PATIENCE,
    WORKERS,
    Scenario,
    complete,
    create,
    difference,
    end,
    left,
    prepare,
    run,
    succeed,
    suspend,
)
from support.waiting import eventually

if TYPE_CHECKING:
    from support.playing import Theatre
    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]
COLLECTED = PATIENCE + 60.0
"""Seconds for what an earlier job left to go: a garbage collector that has just started learns of kinds every 30 s."""
STRANGERS = {
    "configmaps": ("/api/v1", {"data": {"whose": "a stranger's"}}),
    "services": ("/api/v1", {"spec": {"clusterIP": "None", "ports": [{"port": 80}]}}),
    "jobs": (
        "/apis/batch/v1",
        {
            "spec": {
                "suspend": True,
                "template": {
                    "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "example.com/i:1"}]}
                },
            }
        },
    ),
}


async def stranger(scene: Scene, kind: str, name: str) -> Object:
    api, body = STRANGERS[kind]
    manifest = {"metadata": {"name": name, "labels": {"finetune.dev/job-name": "j"}}, **body}

    async def made() -> Any:
        return await scene.api.create(scene.path(kind, api=api), manifest)

    answer = await eventually(made, f"{kind}/{name} to be free", until=lambda a: a.status == 201, timeout=PATIENCE)
    found: Object = answer.body
    return found


async def swap(scene: Scene) -> Object:
    """The FineTuneJob is deleted, and one of the same name takes its place."""
    (await scene.api.delete(scene.job_path(), {"propagationPolicy": "Background"})).must(200)
    return await scene.submit(distribution={"workers": WORKERS}, training={"epochs": 7})


def proxy_of(scene: Scene) -> FaultyProxy:
    assert isinstance(scene.proxy, FaultyProxy)
    return scene.proxy


async def once(scene: Scene, kind: str, action: Callable[[], Awaitable[Any]], first: int = 0) -> Callable[[], Any]:
    """Has something happen just before the operator's call of this kind; what it gave, once it has happened."""
    happened: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def act() -> None:
        happened.set_result(await action())

    proxy_of(scene).script(Rule(kind, Meanwhile(act), first=first))
    return lambda: asyncio.wait_for(happened, PATIENCE)


@pytest.mark.parametrize("kind", ["create configmaps", "create jobs", "patch finetunejobs/status", "create services"])
async def test_a_job_is_replaced_by_one_of_its_name(theatre: "Theatre", kind: str) -> None:
    """Whatever was on its way for the first one does nothing to the second."""
    async with theatre.scene() as scene:
        swapped = await once(scene, kind, lambda: swap(scene))
        await scene.operator.start()
        await scene.submit(distribution={"workers": WORKERS})
        if kind == "create services":
            await prepare(scene)
        uid = (await swapped())["metadata"]["uid"]

        async def owner() -> str:
            job = await scene.api.get(scene.path("jobs", "j-prepare"))
            return str(job.body["metadata"]["ownerReferences"][0]["uid"]) if job.status == 200 else ""

        await eventually(owner, "the second one's prepare", until=lambda found: found == uid, timeout=COLLECTED)
        await prepare(scene)
        await run(scene, "j-0")
        await complete(scene, "j-0")
        job = (await scene.api.get(scene.job_path())).must(200)
        assert job["metadata"]["uid"] == uid
        assert [a["number"] for a in job["status"]["attempts"]] == [0]
        config = (await scene.api.get(scene.path("configmaps", "j-0", "/api/v1"))).must(200)
        assert uid in config["data"]["run.json"]
        assert '"epochs": 7' in config["data"]["run.json"]


async def test_what_took_the_place_of_a_gang_is_not_deleted(theatre: "Theatre") -> None:
    async with theatre.scene() as scene:

        async def replace() -> Object:
            (await scene.api.delete(scene.path("jobs", "j-0"), {"propagationPolicy": "Background"})).must(200)
            return await stranger(scene, "jobs", "j-0")

        await scene.operator.start()
        await create(scene)
        replaced = await once(scene, "delete jobs", replace)
        await scene.policy(suspend=True)
        uid = (await replaced())["metadata"]["uid"]
        await scene.reaches("Suspended")
        await nudged(scene)
        await scene.policy(suspend=False)
        await run(scene, "j-1")
        await complete(scene, "j-1")
        assert (await scene.api.get(scene.path("jobs", "j-0"))).must(200)["metadata"]["uid"] == uid


async def test_what_took_the_place_of_an_expired_job_is_not_deleted(theatre: "Theatre") -> None:
    async with theatre.scene() as scene:
        swapped = await once(scene, "delete finetunejobs", lambda: swap(scene))
        await scene.operator.start()
        await create(scene, ttlSecondsAfterFinished=1)
        await scene.completed("j-0", WORKERS)
        uid = (await swapped())["metadata"]["uid"]

        async def new_one() -> str:
            jobs = await scene.api.get(scene.path("jobs", "j-prepare"))
            return jobs.body["metadata"]["ownerReferences"][0]["uid"] if jobs.status == 200 else ""

        await eventually(new_one, "the second one's prepare", until=lambda found: found == uid, timeout=PATIENCE)
        assert (await scene.api.get(scene.job_path())).must(200)["metadata"]["uid"] == uid


@pytest.mark.parametrize("number", range(5))
async def test_a_job_is_suspended_between_a_read_and_the_status_write(theatre: "Theatre", number: int) -> None:
    """The write is for a version that is no more: it must not happen, or the suspend would be forgotten."""
    async with theatre.scene() as scene:
        suspended = await once(scene, "patch finetunejobs/status", lambda: scene.policy(suspend=True), first=number)
        await scene.operator.start()
        await scene.submit(distribution={"workers": WORKERS})
        # Before each Job there is a record, and after it the whole status.
        if number > 1:
            await prepare(scene)
        if number > 3:
            await scene.run("j-0", WORKERS)
        await suspended()
        status = await scene.reaches("Suspended", timeout=PATIENCE)
        assert all(attempt["outcome"] == "Preempted" for attempt in status.get("attempts") or [])
        await eventually(
            scene.jobs,
            "nothing to run",
            until=lambda jobs: not any(j.startswith("j-0") for j in jobs),
            timeout=PATIENCE,
        )


async def test_the_end_of_a_job_is_not_written_to_its_namesake(theatre: "Theatre") -> None:
    """Or the new one would never run."""
    async with theatre.scene() as scene:
        await scene.operator.start()
        await create(scene)
        swapped = await once(scene, "patch finetunejobs/status", lambda: swap(scene))
        await end(scene, "j-0", Reason.DIVERGED)
        uid = (await swapped())["metadata"]["uid"]

        async def owner() -> str:
            job = await scene.api.get(scene.path("jobs", "j-prepare"))
            return str(job.body["metadata"]["ownerReferences"][0]["uid"]) if job.status == 200 else ""

        await eventually(owner, "its prepare", until=lambda found: found == uid, timeout=PATIENCE)
        await scene.reaches("Preparing", timeout=PATIENCE)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("configmaps", "j-prepare"), ("jobs", "j-prepare"), ("services", "j-0"), ("configmaps", "j-0"), ("jobs", "j-0")],
)
async def test_a_strangers_object_has_a_childs_name(theatre: "Theatre", kind: str, name: str) -> None:
    """The job fails and says which one; the stranger's is as it was."""
    async with theatre.scene() as scene:
        made = await stranger(scene, kind, name)
        await scene.operator.start()
        await scene.submit(distribution={"workers": WORKERS})
        if name == "j-0":
            await prepare(scene)
        status = await scene.reaches("Failed", timeout=PATIENCE)
        assert f"/{name} exists and is not this job's" in status["message"]
        await nudged(scene)
        found = (await scene.api.get(scene.path(kind, name, STRANGERS[kind][0]))).must(200)
        assert found["metadata"]["uid"] == made["metadata"]["uid"]
        assert found.get("data") == made.get("data")


async def test_two_operators_act_at_once(theatre: "Theatre", tally: "Tally", whole: bool) -> None:
    """No lease keeps them apart: both do everything, and nothing is there twice."""

    async def play(story: Scenario) -> str:
        smooth = await theatre.smooth(story.__name__)
        async with theatre.scene() as scene, theatre.second(scene) as other:
            await scene.operator.start()
            await other.start()
            await story(scene)
            await eventually(lambda: left(scene), "the same end", until=lambda o: o == smooth.objects, timeout=20)
            await nudged(scene)
            problems = difference(smooth.objects, await left(scene))
            work = proxy_of(scene).work + other.proxy.work
            return "; ".join([*problems, *([] if work == smooth.work else [str(work)])])

    stories = (succeed, suspend) if whole else (succeed,)
    tally.count("two operators at once", {story.__name__: await play(story) for story in stories})
