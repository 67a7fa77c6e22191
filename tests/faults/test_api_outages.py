"""The API server is away for a while, its watches go deaf, clocks jump: the operator goes on by itself, and at rest it
writes nothing."""

import asyncio
import dataclasses
from typing import TYPE_CHECKING

import pytest

from finetune_api.failures import Reason
from finetune_operator import handlers, reflector
from finetune_operator.settings import Settings
from finetune_sandbox.controlplane import ControlPlane, assets_from_environment
from support.api import Api
from support.faulty import Broken, FaultyProxy, Hang, Refuse, Reset, Rule
from support.operating import Scene
from support.playing import CONSTANTS, Theatre
from support.scenarios import PATIENCE, WORKERS, create, difference, end, finish, left, prepare, run
from support.waiting import eventually
from support.world import RESULT, World, make_job

if TYPE_CHECKING:
    from pathlib import Path

    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
MINUTE, NOTICED, ASSETS = 60, 120, assets_from_environment()
PATIENT = CONSTANTS | {"finetune_operator.reflector.BACKOFFS": [0.5] * 120}
"""As long as the real ones are, against outages that are as much shorter."""


def test_ten_minutes_without_an_api_server_end_no_process_and_deaf_watches_are_noticed_in_two() -> None:
    settings = Settings()
    assert sum(reflector.BACKOFFS) > 10 * MINUTE
    assert settings.stale_seconds > 10 * MINUTE
    # The last pause, and what the request itself may take.
    assert max(reflector.BACKOFFS) + handlers.ANSWER_SECONDS < NOTICED
    assert reflector.SILENCE_SECONDS + handlers.ANSWER_SECONDS < NOTICED
    assert settings.resync_seconds + settings.api_timeout_seconds / 2 < NOTICED


def proxy_of(scene: Scene) -> FaultyProxy:
    assert isinstance(scene.proxy, FaultyProxy)
    return scene.proxy


OUTAGES = {
    "503": Refuse(503),
    "429 with Retry-After": Refuse(429, retry_after="2"),
    "500": Refuse(500),
    "connections reset": Reset(committed=False),
    "silence": Hang(committed=False),
}


async def outage(theatre: Theatre, name: str, seconds: float) -> str:
    """The gang runs and ends while nobody answers the operator; what is wrong afterwards."""
    smooth = await theatre.smooth("succeed")
    async with dataclasses.replace(theatre, constants=PATIENT).scene() as scene:
        await scene.operator.start()
        await scene.submit(distribution={"workers": WORKERS})
        await prepare(scene)
        await scene.pods("j-0", WORKERS)
        proxy_of(scene).down = OUTAGES[name]
        await scene.run("j-0", WORKERS)
        await finish(scene, "j-0")
        # The span is what is tried here.
        await asyncio.sleep(seconds)
        calls = len(proxy_of(scene).calls)
        proxy_of(scene).down = None
        await eventually(lambda: left(scene), "the end", until=lambda o: o == smooth.objects, timeout=PATIENCE)
        assert scene.operator.starts == 1, "it was started anew"  # type: ignore[attr-defined]
        # Patience is not insistence: a handful of requests a second, of all its parts together.
        assert calls < 60 + 12 * seconds, f"{calls} requests"
        return "\n".join(difference(smooth.objects, await left(scene)))


@pytest.mark.parametrize("name", OUTAGES)
async def test_an_outage(theatre: Theatre, tally: "Tally", whole: bool, name: str) -> None:
    if not whole and name not in ("503", "silence"):
        pytest.skip("in the long form")
    tally.count("the API server away or restarted", {name: await outage(theatre, name, 20.0 if whole else 3.0)})


async def test_started_while_nobody_answers(theatre: Theatre) -> None:
    async with theatre.scene() as scene:
        proxy_of(scene).down = Refuse(503)
        await scene.operator.start()
        await scene.submit(distribution={"workers": WORKERS})

        async def tried_again() -> bool:
            return scene.operator.starts > 1  # type: ignore[attr-defined]

        await eventually(tried_again, "another start", timeout=PATIENCE)
        proxy_of(scene).down = None
        await prepare(scene)
        await run(scene, "j-0")


@pytest.mark.parametrize("how", ["drop", "silence"])
async def test_deaf_watches_are_made_up_for(theatre: Theatre, tally: "Tally", how: str) -> None:
    """From the start on no watch tells anything; the socket is silent, or only what happened is left out."""
    smooth = await theatre.smooth("retry")
    async with theatre.scene() as scene:
        deaf = [
            Rule(f"watch {kind} event", Broken(how), times=10_000)  # type: ignore[arg-type]
            for kind in ("finetunejobs", "jobs", "pods")
        ]
        proxy_of(scene).script(*deaf)
        await scene.operator.start()
        await create(scene)
        await end(scene, "j-0", Reason.HUNG)
        await run(scene, "j-1")
        await finish(scene, "j-1")
        await scene.reaches("Complete", timeout=PATIENCE)
        assert all(rule.used for rule in deaf)
        tally.count("deaf watches", {how: "; ".join(difference(smooth.objects, await left(scene)))})


@pytest.mark.parametrize("hours", [-1, 1])
async def test_the_clock_jumps(tally: "Tally", hours: int) -> None:
    """At any point of a story with a failure in it; backwards as after a virtual machine's pause, or forwards."""
    results = {}
    for when in range(6):
        world, step = World(make_job().build()), 0

        async def settle(world: World = world, when: int = when) -> None:
            nonlocal step
            await world.settle()
            if step == when:
                world.later(hours * 3600)
                await world.settle()
            step += 1

        await settle()
        world.run("support-bot-prepare")
        world.prepared()
        await settle()
        world.run("support-bot-0")
        await settle()
        world.fail("support-bot-0", Reason.HUNG)
        await settle()
        world.later(60 + 3600 * (hours < 0))
        await settle()
        world.run("support-bot-1")
        await settle()
        world.complete("support-bot-1")
        await settle()
        ended = world.state, [(a.number, a.outcome) for a in world.status.attempts], sorted(world.created)
        results[f"{hours} h after step {when}"] = (
            ""
            if ended[:2] == ("Complete", [(0, "Retryable"), (1, "Succeeded")]) and len(set(ended[2])) == len(ended[2])
            else str(ended)
        )
    tally.count("the clock jumps", results)


async def test_at_rest_nothing_is_written(theatre: Theatre, whole: bool) -> None:
    """As many LISTs as ten minutes have, over jobs that are over, that wait for a queue and that run."""
    count = 500 if whole else 30
    async with theatre.scene(RESYNC_SECONDS="1") as scene:
        await scene.operator.start()
        await create(scene)
        done = {"state": "Complete", "conditions": [condition("Complete")], "attempts": []}
        for number in range(count - 1):
            made = await scene.submit(f"idle-{number}", runPolicy={"suspend": True})
            if number % 2:
                path = scene.job_path(made["metadata"]["name"]) + "/status"
                (await scene.api.patch(path, {"status": done})).must(200)
        proxy = proxy_of(scene)

        async def all_known() -> bool:
            jobs = await scene.api.items(scene.path("finetunejobs", api="/apis/finetune.dev/v1alpha1"))
            return all((job.get("status") or {}).get("state") for job in jobs)

        await eventually(all_known, "every job to be looked at", timeout=PATIENCE * 3)

        def lists() -> int:
            return sum(call.kind == "list finetunejobs" for call in proxy.calls)

        async def listed_twice(since: int) -> bool:
            return lists() > since + 2

        start = lists()
        await eventually(lambda: listed_twice(start), "its last writes", timeout=PATIENCE)
        before, start = dict(proxy.commits), lists()

        async def listed() -> bool:
            return lists() >= start + 10 * MINUTE / Settings().resync_seconds

        await eventually(listed, "the LISTs of ten minutes", timeout=PATIENCE * 2)
        assert dict(proxy.commits) == before


def condition(kind: str) -> dict[str, str]:
    time = "2026-01-01T00:00:00Z"
    return {"type": kind, "status": "True", "reason": kind, "message": "", "lastTransitionTime": time}


@pytest.mark.skipif(ASSETS is None, reason="needs the programs of $KUBEBUILDER_ASSETS")
async def test_the_api_server_is_killed_at_each_stage(theatre: Theatre, tally: "Tally", tmp_path: "Path") -> None:
    assert ASSETS is not None
    async with ControlPlane(ASSETS, tmp_path / "plane") as plane, Api.connect(plane.kubeconfig) as api:
        own = dataclasses.replace(theatre, kubeconfig=plane.kubeconfig, api=api, constants=PATIENT, smooth_runs={})
        await own.set_up()
        smooth = await own.smooth("retry")
        async with own.scene() as scene:

            async def restart() -> None:
                await plane.kill_apiserver()
                await plane.restart_apiserver()

            await scene.operator.start()
            await scene.submit(distribution={"workers": WORKERS})
            await scene.reaches("Preparing", timeout=PATIENCE)
            await restart()
            await prepare(scene)
            await scene.pods("j-0", WORKERS)
            await restart()
            await run(scene, "j-0")
            await restart()
            await end(scene, "j-0", Reason.HUNG)
            await restart()
            await run(scene, "j-1")
            await finish(scene, "j-1")
            await restart()
            status = await scene.reaches("Complete", timeout=PATIENCE)
            assert status["result"]["uri"] == RESULT.uri
            await eventually(lambda: left(scene), "the end", until=lambda o: o == smooth.objects, timeout=PATIENCE)
            assert scene.operator.starts == 1  # type: ignore[attr-defined]
            lines = difference(smooth.objects, await left(scene))
            work = proxy_of(scene).work
            tally.count(
                "the API server away or restarted",
                {"kill -9 at five stages": "; ".join([*lines, *([] if work == smooth.work else [str(work)])])},
            )
