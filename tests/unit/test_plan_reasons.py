"""Every reason of the closed list, as a job comes to it, and what follows from it."""

import datetime
from collections.abc import Awaitable, Callable

import pytest

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage, outcome_of
from support.world import World, make_job, make_profile, rfc3339, started

Story = Callable[[World], Awaitable[None]]


async def nobody_made_the_profile(world: World) -> None:
    world.profiles.clear()
    await world.settle()


async def too_many_workers(world: World) -> None:
    world.profiles = [make_profile(limits={"maxWorkers": 1})]
    world.job["spec"]["distribution"] = {"workers": 2}
    await world.settle()


async def too_little_memory(world: World) -> None:
    world.profiles = [make_profile(accelerator={"memory": "1Gi"})]
    await started(world, attempt_runs=False)


async def no_room(world: World) -> None:
    await started(world, attempt_runs=False)
    full = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    world.pod("support-bot-0")["status"] = {"phase": "Pending", "conditions": [full]}
    del world.pod("support-bot-0")["spec"]["nodeName"]
    world.later(15)
    await world.settle()


async def no_image(world: World) -> None:
    await started(world, attempt_runs=False)
    waiting = {"name": "trainer", "state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}}
    world.pod("support-bot-0")["status"] = {"phase": "Pending", "containerStatuses": [waiting]}
    world.later(15)
    await world.settle()


async def too_long_before_running(world: World) -> None:
    world.set_policy(preRunningDeadlineSeconds=60)
    await started(world, attempt_runs=False)
    world.later(60)
    await world.settle()


async def too_long_running(world: World) -> None:
    world.set_policy(activeDeadlineSeconds=60)
    await started(world)
    world.later(60)
    await world.settle()


async def a_node_goes(world: World) -> None:
    await started(world)
    gone = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC", "message": "node is gone"}
    world.pod("support-bot-0")["status"] = {"phase": "Failed", "conditions": [gone]}
    world.finish("support-bot-0", "Failed")
    await world.settle()


async def too_often(world: World) -> None:
    world.set_policy(maxAttempts=1)
    await started(world)
    world.fail("support-bot-0", Reason.HUNG)
    await world.settle()


async def the_budget_is_spent(world: World) -> None:
    world.profiles = [make_profile(budget={"gpuHours": 1})]
    await started(world)
    world.later(3600)
    await world.settle()


STORIES: dict[Reason, tuple[Story, str]] = {
    Reason.PROFILE_NOT_FOUND: (nobody_made_the_profile, "Pending"),
    Reason.NOT_ALLOWED_BY_PROFILE: (too_many_workers, "Failed"),
    Reason.DOES_NOT_FIT: (too_little_memory, "Failed"),
    Reason.UNSCHEDULABLE: (no_room, "Starting"),
    Reason.IMAGE_PULL_ERROR: (no_image, "Starting"),
    Reason.PRE_RUNNING_DEADLINE_EXCEEDED: (too_long_before_running, "Failed"),
    Reason.DEADLINE_EXCEEDED: (too_long_running, "Failed"),
    Reason.BUDGET_EXCEEDED: (the_budget_is_spent, "Suspended"),
    Reason.NODE_LOST: (a_node_goes, "Retrying"),
    Reason.MAX_ATTEMPTS_REACHED: (too_often, "Failed"),
}
"""Of the reasons that no pod tells by its exit code."""


def test_every_reason_has_its_story() -> None:
    # That of InternalError is in test_containment: no plan comes to it.
    assert set(STORIES) | set(EXIT_CODES) | {Reason.INTERNAL_ERROR} == set(Reason)


@pytest.mark.parametrize("reason", STORIES)
async def test_what_the_operator_finds_itself(reason: Reason) -> None:
    story, state = STORIES[reason]
    world = World(make_job().build())
    await story(world)
    assert world.state == state
    told = [attempt.reason for attempt in world.status.attempts]
    assert reason in told + [condition.reason for condition in world.status.conditions]
    assert any(event["reason"] == reason for event in world.events)


@pytest.mark.parametrize("reason", EXIT_CODES)
async def test_a_gang_that_ends_for_this_reason(reason: Reason) -> None:
    """Retryable: the next attempt after a pause. Permanent: the end, at once. Preempted: again at once, for nothing."""
    world = World(
        make_job().with_policy(maxAttempts=2).build(), profiles=[make_profile(accelerator={"memory": "80Gi"})]
    )
    await started(world)
    world.fail("support-bot-0", reason, "this is why")
    pause = await world.settle()
    [first, *_] = world.status.attempts
    assert (first.outcome, first.reason) == (outcome_of(reason), reason)
    assert "this is why" in (first.message or "")
    assert any(event["reason"] == reason and "this is why" in event["message"] for event in world.events)
    if first.outcome == "Retryable":
        assert world.state == "Retrying"
        assert pause
        world.later(pause)
        await world.settle()
    if first.outcome == "Permanent":
        failed = world.status.condition("Failed")
        assert failed
        assert (failed.status, failed.reason) == ("True", reason)
        assert world.names("Job") == ["support-bot-0", "support-bot-prepare"]
    else:
        assert world.state == "Starting"
        assert "support-bot-1" in world.names("Job")


@pytest.mark.parametrize("reason", [reason for reason in EXIT_CODES if outcome_of(reason) == "Permanent"])
async def test_prepare_that_ends_for_this_reason(reason: Reason) -> None:
    world = World(make_job().build())
    await world.settle()
    world.fail("support-bot-prepare", reason, "this is why")
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert (failed.status, failed.reason) == ("True", reason)
    assert failed.message.startswith("this is why")
    assert world.status.attempts == []


async def test_what_the_kernel_killed_is_host_memory_though_its_node_drains() -> None:
    """OOMKilled is looked at first: the disruption came later, or came of it."""
    world = await started(World(make_job().with_spec(distribution={"workers": 2}).build()))
    killed = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": "memory"}
    world.end("support-bot-0", 1, TerminationMessage(), exitCode=137, reason="OOMKilled")
    world.pod("support-bot-0", 1)["status"] |= {"conditions": [killed]}
    world.pod("support-bot-0", 0)["metadata"]["deletionTimestamp"] = rfc3339(world.now + datetime.timedelta(seconds=30))
    world.finish("support-bot-0", "Failed")
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "HostOutOfMemory"
    assert "spec.resources.memory must be larger" in failed.message
    [attempt] = world.status.attempts
    assert (attempt.exit_code, attempt.node) == (137, "node-1")
