"""Suspending, resuming, and what counts meanwhile."""

import pytest

from finetune_api.failures import Reason
from support.world import Crash, World, make_job, started


async def test_a_job_that_is_born_suspended_creates_nothing() -> None:
    world = World(make_job().with_policy(suspend=True).build())
    await world.settle()
    suspended = world.status.condition("Suspended")
    assert suspended
    assert (world.state, suspended.status, world.created) == ("Suspended", "True", [])
    world.set_policy(suspend=False)
    await world.settle()
    assert world.state == "Preparing"
    assert "Resumed" in [e["reason"] for e in world.events]


async def test_suspending_stops_the_gang_and_resuming_goes_on_with_the_next_number() -> None:
    world = await started(World(make_job().with_policy(maxAttempts=1).build()))
    uid = world.objects["Job", "support-bot-0"]["metadata"]["uid"]
    world.set_policy(suspend=True)
    await world.settle()
    [attempt] = world.status.attempts
    assert (world.state, attempt.outcome, attempt.uid) == ("Suspended", "Preempted", uid)
    assert world.deleted_jobs == ["Job/support-bot-0"]
    world.set_policy(suspend=False)
    await world.settle()
    assert world.names("Job") == ["support-bot-prepare"], "its pods still write their checkpoint"
    world.sweep("support-bot-0")
    await world.settle()
    assert world.names("Job") == ["support-bot-1", "support-bot-prepare"]
    world.run("support-bot-1")
    await world.settle()
    assert world.state == "Running"


async def test_prepare_is_stopped_too_but_kept_where_it_is_done() -> None:
    world = World(make_job().build())
    await world.settle()
    world.set_policy(suspend=True)
    await world.settle()
    assert world.names("Job") == []
    assert (world.state, world.status.attempts) == ("Suspended", [])
    world.set_policy(suspend=False)
    await world.settle()
    world.prepared()
    world.set_policy(suspend=True)
    await world.settle()
    assert world.names("Job") == ["support-bot-prepare"]
    world.set_policy(suspend=False)
    await world.settle()
    assert world.state == "Starting"


async def test_a_suspend_that_comes_too_late_changes_nothing() -> None:
    world = await started(World(make_job().build()))
    world.complete("support-bot-0")
    world.set_policy(suspend=True)
    await world.settle()
    assert world.state == "Complete"
    other = await started(World(make_job().build()))
    other.fail("support-bot-0", Reason.DIVERGED)
    other.set_policy(suspend=True)
    await other.settle()
    assert other.state == "Failed"


async def test_a_stop_that_was_cut_short_is_finished_after_the_resume() -> None:
    world = await started(World(make_job().build()))
    world.set_policy(suspend=True)
    world.crash_after = world.writes + 1  # the status is written, the Job is not deleted yet
    with pytest.raises(Crash):
        await world.reconcile()
    world.set_policy(suspend=False)
    await world.settle()
    assert world.deleted_jobs == ["Job/support-bot-0"]
    world.sweep("support-bot-0")
    await world.settle()
    assert world.names("Job") == ["support-bot-1", "support-bot-prepare"]
    assert [a.outcome for a in world.status.attempts] == ["Preempted", None]
