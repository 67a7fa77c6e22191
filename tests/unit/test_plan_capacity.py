"""A gang that does not find room as a whole: what it holds is given back, and fewer workers may do."""

import json
from typing import Any

import pytest

from finetune_api.failures import Reason
from support.world import PREPARED, Object, World, make_job, make_profile

GRACE = 300


async def asked(workers: int = 4, placed: int = 0, policy: Object | None = None, **spec: Any) -> World:
    """A gang of which only so many found a node."""
    wanted = {"distribution": {"workers": workers}, "training": {"globalBatchSize": 24}, "runPolicy": policy or {}}
    world = World(make_job().with_spec(**(wanted | spec)).build())
    await world.settle()
    world.prepared(PREPARED)
    await world.settle()
    world.place("support-bot-0", placed)
    await world.settle()
    return world


async def passes(world: World, seconds: float) -> float | None:
    world.later(seconds)
    return await world.settle()


async def given_back(world: World, number: int, placed: int) -> float:
    """The attempt with its part of the places waits out its grace; the pause after it, in seconds."""
    world.place(f"support-bot-{number}", placed)
    await world.settle()
    await passes(world, GRACE)
    world.sweep(f"support-bot-{number}")
    assert world.state == "Queued"
    pause = await world.settle()
    assert pause
    return pause


def workers(world: World, number: int) -> int:
    gang = world.objects["Job", f"support-bot-{number}"]["spec"]
    told = json.loads(world.objects["ConfigMap", f"support-bot-{number}"]["data"]["run.json"])
    sizing = told["sizing"]
    assert gang["completions"] == gang["parallelism"] == told["devices"]["workers"]
    # A step learns from as many examples as ever.
    assert sizing["microBatchSize"] * sizing["gradientAccumulation"] * gang["completions"] == 24
    count: int = gang["completions"]
    return count


async def test_half_a_gang_gives_its_places_back_and_pays_no_attempt() -> None:
    world = await asked(placed=3, policy={"maxAttempts": 1})
    assert world.state == "Starting"
    await passes(world, GRACE - 1)
    assert world.deleted == []
    await passes(world, 1)
    assert world.deleted_jobs == ["Job/support-bot-0"]
    assert world.state == "Queued"
    [attempt] = world.status.attempts
    assert (attempt.outcome, attempt.reason, attempt.workers, attempt.placed) == ("Preempted", "Unschedulable", 4, 3)
    text = "3 of 4 workers found a node within 300 s; what they held is given back"
    assert attempt.message == text
    assert text in (world.status.message or "")
    assert any(event["reason"] == "Unschedulable" and text in event["message"] for event in world.events)
    world.sweep("support-bot-0")
    pause = await world.settle()
    assert pause
    assert 10 <= pause <= 20
    await passes(world, pause)
    assert (world.state, world.names("Job")) == ("Starting", ["support-bot-1", "support-bot-prepare"])
    world.run("support-bot-1")
    await world.settle()
    assert world.state == "Running"


async def test_the_pauses_grow_and_begin_anew_once_it_ran() -> None:
    world = await asked(placed=3)
    pauses = []
    for number in range(3):
        pauses.append(await given_back(world, number, 3))
        await passes(world, pauses[-1])
    assert [10 * 2**n <= pause <= 20 * 2**n for n, pause in enumerate(pauses)] == [True] * 3
    world.run("support-bot-3")
    await world.settle()
    world.fail("support-bot-3", Reason.PREEMPTED)
    await world.settle()
    assert await given_back(world, 4, 1) <= 20


async def test_two_gangs_come_back_at_different_times() -> None:
    pauses = set()
    for number in range(8):
        world = await asked(placed=3)
        world.job["metadata"]["uid"] = f"uid-{number}"
        for raw in world.objects.values():
            for owner in raw["metadata"].get("ownerReferences", ()):
                owner["uid"] = f"uid-{number}" if owner["kind"] == "FineTuneJob" else owner["uid"]
        pauses.add(await given_back(world, 0, 3))
    assert len(pauses) > 3


async def test_what_holds_nothing_waits_and_so_does_what_starts() -> None:
    """No node is kept from others by pods that have none; a gang that is placed as a whole only takes its time."""
    for placed in (0, 4):
        world = await asked(placed=placed)
        await passes(world, 10 * GRACE)
        assert (world.deleted, world.state) == ([], "Starting")


async def test_pods_that_a_quota_refuses_count_as_unplaced() -> None:
    world = await asked(placed=4)
    del world.objects["Pod", "support-bot-0-3-x"]
    await passes(world, GRACE)
    assert world.deleted_jobs == ["Job/support-bot-0"]


async def test_a_queue_has_its_own_way() -> None:
    world = await asked(placed=0, queue={"name": "team-a"})
    world.admit("support-bot-0")
    world.place("support-bot-0", 3)
    await world.settle()
    await passes(world, 10 * GRACE)
    assert (world.deleted, world.state) == ([], "Starting")


async def test_the_profile_says_how_long() -> None:
    world = World(
        make_job().with_spec(distribution={"workers": 2}).build(), profiles=[make_profile(schedulingGraceSeconds=20)]
    )
    await world.settle()
    world.prepared()
    await world.settle()
    world.place("support-bot-0", 1)
    await world.settle()
    await passes(world, 20)
    assert world.state == "Queued"


async def test_the_deadline_counts_from_the_first_time_it_was_asked_for() -> None:
    world = await asked(placed=3, policy={"preRunningDeadlineSeconds": 1000})
    for number in range(2):
        await passes(world, await given_back(world, number, 3))
    left = 1000 - (world.now - (world.status.attempts[0].creation_time or world.now)).total_seconds()
    await passes(world, left - 1)
    assert world.state in ("Starting", "Queued")
    await passes(world, 1)
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "PreRunningDeadlineExceeded"


async def test_it_starts_with_as_many_as_found_a_node() -> None:
    world = await asked(
        distribution={"workers": 4, "minWorkers": 2}, placed=3, policy={"preRunningDeadlineSeconds": 200}
    )
    assert workers(world, 0) == 4
    await passes(world, 199)
    assert world.deleted == []
    await passes(world, 1)
    assert world.deleted_jobs == ["Job/support-bot-0"]
    world.sweep("support-bot-0")
    await world.settle()
    assert workers(world, 1) == 3
    assert world.status.attempts[0].outcome == "Preempted"
    assert world.status.gpus == 3
    assert "starts 3 workers, of 4 that are wanted" in (world.status.message or "")
    messages = [event["message"] for event in world.events]
    assert "created Job support-bot-1; workers: 3 instead of 4" in messages
    assert any("a step learns from as many examples as before" in message for message in messages)
    world.run("support-bot-1")
    await world.settle()
    assert world.state == "Running"
    # Whatever ends it, the next one is the whole gang again.
    world.fail("support-bot-1", Reason.PREEMPTED)
    await world.settle()
    assert workers(world, 2) == 4


async def test_only_numbers_that_divide_the_batch_are_taken() -> None:
    """24 examples a step, 7 places of 8: six workers."""
    world = await asked(
        distribution={"workers": 8, "minWorkers": 2}, placed=7, policy={"preRunningDeadlineSeconds": 200}
    )
    await passes(world, 200)
    world.sweep("support-bot-0")
    await world.settle()
    assert workers(world, 1) == 6


async def test_between_two_tries_the_deadline_ends_the_pause() -> None:
    world = await asked(
        distribution={"workers": 4, "minWorkers": 2}, placed=2, policy={"preRunningDeadlineSeconds": GRACE + 5}
    )
    pause = await given_back(world, 0, 2)
    assert pause == 5
    await passes(world, pause)
    assert workers(world, 1) == 2


async def test_less_and_less_down_to_the_minimum() -> None:
    distribution = {"workers": 4, "minWorkers": 2}
    world = await asked(distribution=distribution, placed=3, policy={"preRunningDeadlineSeconds": 200})
    await passes(world, 200)
    world.sweep("support-bot-0")
    await world.settle()
    assert workers(world, 1) == 3
    # Somebody else was faster.
    world.place("support-bot-1", 2)
    await world.settle()
    await passes(world, 200)
    world.sweep("support-bot-1")
    await world.settle()
    assert workers(world, 2) == 2
    world.place("support-bot-2", 1)
    await world.settle()
    await passes(world, 200)
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "PreRunningDeadlineExceeded"
    assert world.deleted[-1] == "Job/support-bot-2"


@pytest.mark.parametrize("placed", [0, 1])
async def test_fewer_than_the_minimum_is_the_end(placed: int) -> None:
    distribution = {"workers": 4, "minWorkers": 2}
    world = await asked(distribution=distribution, placed=placed, policy={"preRunningDeadlineSeconds": 200})
    await passes(world, 200)
    assert world.status.state == "Failed"
    assert "did not run within 200 preRunningDeadlineSeconds" in (world.status.message or "")


async def test_what_ran_out_of_memory_with_all_has_less_in_a_micro_batch_with_few() -> None:
    world = await asked(
        distribution={"workers": 4, "minWorkers": 2},
        placed=4,
        policy={"preRunningDeadlineSeconds": 200},
        training={"globalBatchSize": 24},
    )
    world.run("support-bot-0")
    await world.settle()
    world.fail("support-bot-0", Reason.OUT_OF_MEMORY)
    pause = await world.settle()
    assert pause
    await passes(world, pause)
    sizing = json.loads(world.objects["ConfigMap", "support-bot-0"]["data"]["run.json"])["sizing"]
    assert sizing["microBatchSize"] == 6
    world.place("support-bot-1", 2)
    await world.settle()
    await passes(world, 200)
    world.sweep("support-bot-1")
    await world.settle()
    assert workers(world, 2) == 2
    sizing = json.loads(world.objects["ConfigMap", "support-bot-2"]["data"]["run.json"])["sizing"]
    assert (sizing["microBatchSize"], sizing["gradientAccumulation"]) == (3, 4)


async def test_a_suspended_job_asks_for_all_of_them_anew() -> None:
    distribution = {"workers": 4, "minWorkers": 2}
    world = await asked(distribution=distribution, placed=3, policy={"preRunningDeadlineSeconds": 200})
    world.set_policy(suspend=True)
    await world.settle()
    world.sweep("support-bot-0")
    await passes(world, 1000)
    world.set_policy(suspend=False)
    await world.settle()
    assert workers(world, 1) == 4
    world.place("support-bot-1", 3)
    await world.settle()
    await passes(world, 199)
    assert world.state == "Starting"
    await passes(world, 1)
    world.sweep("support-bot-1")
    await world.settle()
    assert workers(world, 2) == 3
