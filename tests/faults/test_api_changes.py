"""The cluster changes under the operator: etcd is compacted, definitions of our kinds are applied anew, Nodes go."""

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_api.failures import Reason
from finetune_sandbox.client import Client
from finetune_sandbox.controlplane import ControlPlane, assets_from_environment
from finetune_sandbox.jobs import JobController
from support.api import Api, Object
from support.faulty import FaultyProxy, Reset
from support.operating import Scene
from support.playing import CONSTANTS, Theatre
from support.scenarios import PATIENCE, WORKERS, complete, create, difference, end, finish, left, prepare, run
from support.waiting import eventually

if TYPE_CHECKING:
    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
ASSETS = assets_from_environment()
PATIENT: dict[str, Any] = CONSTANTS | {"finetune_operator.reflector.BACKOFFS": [0.2] * 300}
NEVER = "100000"
"""Seconds between the looks at all jobs: what is noticed is noticed by the watches."""
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


Forget = Callable[[], Awaitable[None]]


@asynccontextmanager
async def forgetful(folder: Path) -> AsyncIterator[tuple[Path, Forget]]:
    """An API server of the test's own, and what makes it forget all that happened before now."""
    if ASSETS:
        async with ControlPlane(ASSETS, folder) as plane:

            async def forget() -> None:
                await plane.compact()
                await plane.restart_apiserver()

            yield plane.kubeconfig, forget
        return
    from finetune_sandbox.server import ApiServer  # here: a real control plane needs none of it

    async with AsyncExitStack() as stack:
        server = ApiServer()
        await server.start(folder)
        stack.push_async_callback(server.stop)
        client = await stack.enter_async_context(await Client.from_kubeconfig(server.kubeconfig))
        jobs = JobController(client)
        jobs.start()
        stack.push_async_callback(jobs.close)

        async def drop() -> None:
            for table in server.store.tables.values():
                table.forget_history(server.store.rev)

        yield server.kubeconfig, drop


async def test_etcd_is_compacted_while_no_watch_is_open(theatre: Theatre, tally: "Tally", tmp_path: Path) -> None:
    """What happened meanwhile can be told by no watch: all kinds are listed again."""
    async with forgetful(tmp_path / "plane") as (kubeconfig, forget), Api.connect(kubeconfig) as api:
        own = dataclasses.replace(theatre, kubeconfig=kubeconfig, api=api, constants=PATIENT, smooth_runs={})
        await own.set_up()
        smooth = await own.smooth("retry")
        async with own.scene(RESYNC_SECONDS=NEVER) as scene:
            await scene.operator.start()
            await scene.submit(distribution={"workers": WORKERS})
            await scene.reaches("Preparing", timeout=PATIENCE)
            for step, job in ((prepare, "j-prepare"), (ends, "j-0"), (runs, "j-1"), (finishes, "j-1")):
                # What the step needs is there, so that it can happen without the operator.
                await scene.pods(job, 1 if job == "j-prepare" else WORKERS)
                if step is ends:
                    await run(scene, job)
                await missed(scene, step, forget)
            # A real Job controller takes its time after a compaction, too.
            await eventually(lambda: over(scene, "j-1"), "end of the gang's Job", timeout=PATIENCE * 3)
            await scene.reaches("Complete", timeout=PATIENCE)
            assert scene.operator.starts == 1  # type: ignore[attr-defined]
            tally.count("etcd compacted", {"four times": "; ".join(difference(smooth.objects, await left(scene)))})


async def over(scene: Scene, job: str) -> bool:
    found = (await scene.api.get(scene.path("jobs", job))).must(200)
    return any(c["type"] == "Complete" for c in found.get("status", {}).get("conditions", []))


async def ends(scene: Scene) -> None:
    await end(scene, "j-0", Reason.HUNG)


async def runs(scene: Scene) -> None:
    await scene.run("j-1", WORKERS)


async def finishes(scene: Scene) -> None:
    await finish(scene, "j-1")


async def missed(scene: Scene, happens: Callable[[Scene], Awaitable[None]], forget: Forget) -> None:
    """It happens while the operator's connections are broken, and is forgotten before it can connect again."""
    proxy = scene.proxy
    assert isinstance(proxy, FaultyProxy)

    async def asked(verb: str, since: int) -> None:
        async def kinds() -> set[str]:
            return {call.resource for call in proxy.calls[since:] if call.verb == verb}

        everything = {"finetunejobs", "jobs", "pods"}
        await eventually(kinds, f"a {verb} of each kind", until=lambda found: found >= everything, timeout=PATIENCE)

    since = len(proxy.calls)
    proxy.down = Reset(committed=False)
    # Every watch has ended, and was asked for anew in vain.
    await asked("watch", since)
    await happens(scene)
    await forget()
    since = len(proxy.calls)
    proxy.down = None
    await asked("list", since)


async def test_the_definitions_are_applied_anew_while_a_job_runs(theatre: Theatre, tally: "Tally") -> None:
    """As an upgrade does, first of all: other descriptions, and a field that this operator does not know."""
    smooth = await theatre.smooth("succeed")
    results = {}
    for plural in ("finetunejobs", "finetuneprofiles"):
        async with theatre.scene(RESYNC_SECONDS=NEVER) as scene:
            await scene.operator.start()
            path = f"{CRDS}/{plural}.finetune.dev"
            before = (await scene.api.get(path)).must(200)["spec"]
            await create(scene)
            try:
                (await scene.api.patch(path, {"spec": {"versions": newer(before)}})).must(200)
                # Whatever happens from here on has to be heard through watches of the new definition.
                await scene.submit("later", runPolicy={"suspend": True})
                await scene.reaches("Suspended", "later", timeout=PATIENCE)
                (await scene.api.delete(scene.job_path("later"))).must(200)
                await complete(scene, "j-0")
            finally:
                (await scene.api.patch(path, {"spec": {"versions": before["versions"]}})).must(200)
            assert scene.operator.starts == 1  # type: ignore[attr-defined]
            found = await eventually(lambda: left(scene), "end", until=lambda o: o == smooth.objects, timeout=PATIENCE)
            results[plural] = "; ".join(difference(smooth.objects, found))
    tally.count("definitions applied anew", results)


def newer(spec: Object) -> list[Any]:
    """The versions of a CustomResourceDefinition with another description and one more optional field."""
    [version] = spec["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    fields = schema["properties"]["spec"]
    fields = fields | {"properties": fields["properties"] | {"tomorrow": {"type": "string"}}}
    schema = schema | {"description": "of tomorrow", "properties": schema["properties"] | {"spec": fields}}
    return [version | {"schema": {"openAPIV3Schema": schema}}]


async def test_a_node_is_deleted_under_its_pods(theatre: Theatre, tally: "Tally") -> None:
    """No kubelet tells of these pods any more: the pod garbage collector marks them as disrupted and deletes them."""
    smooth = await theatre.smooth("retry")
    async with theatre.scene() as scene:
        await scene.operator.start()
        await create(scene)
        pods = await scene.pods("j-0", WORKERS)
        # What the collector does to each pod of the Node, in its order.
        time = pods[0]["metadata"]["creationTimestamp"]
        gone = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "DeletionByPodGC",
            "message": "PodGC: node no longer exists",
            "lastTransitionTime": time,
        }
        for pod in pods:
            path = scene.path("pods", pod["metadata"]["name"], "/api/v1")
            # After the first of them the Job controller removes the others, perhaps before the collector comes to them.
            failed = {"status": {"phase": "Failed", "conditions": [gone]}}
            assert (await scene.api.patch(f"{path}/status", failed)).status in (200, 404)
            assert (await scene.api.delete(path, {"gracePeriodSeconds": 0})).status in (200, 404)
        await run(scene, "j-1")
        status = await scene.status()
        assert [(a["number"], a.get("outcome")) for a in status["attempts"]] == [(0, "Preempted"), (1, None)]
        await complete(scene, "j-1")
        proxy = scene.proxy
        assert isinstance(proxy, FaultyProxy)
        work = proxy.work
        lines = [] if work == smooth.work else [f"{work - smooth.work} more, {smooth.work - work} less"]
        tally.count("a Node is deleted under its pods", {"all of the gang": "; ".join(lines)})
