"""activeDeadlineSeconds and ttlSecondsAfterFinished."""

from finetune_api.failures import Reason
from support.world import World, make_job, make_profile, started


async def test_running_time_is_bounded() -> None:
    world = await started(World(make_job().with_policy(activeDeadlineSeconds=100).build()))
    assert await world.reconcile() == 100
    world.later(99)
    await world.settle()
    assert world.state == "Running"
    world.later(1)
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "DeadlineExceeded"
    assert world.deleted_jobs == ["Job/support-bot-0"]
    assert world.status.attempts[0].outcome == "Permanent"


async def test_time_before_the_gang_runs_and_between_attempts_is_free() -> None:
    world = await started(World(make_job().with_policy(activeDeadlineSeconds=100).build()), attempt_runs=False)
    world.later(1000)
    await world.settle()
    assert world.state == "Starting"
    world.run("support-bot-0")
    await world.settle()
    world.later(60)
    world.fail("support-bot-0", Reason.HUNG)
    await world.settle()
    world.later(1000)
    await world.settle()
    world.run("support-bot-1")
    await world.settle()
    assert await world.reconcile() == 40
    world.later(40)
    await world.settle()
    assert world.state == "Failed"


async def test_it_starts_anew_after_a_suspend() -> None:
    world = await started(World(make_job().with_policy(activeDeadlineSeconds=100).build()))
    world.later(90)
    world.set_policy(suspend=True)
    await world.settle()
    world.sweep("support-bot-0")
    world.later(10)
    world.set_policy(suspend=False)
    await world.settle()
    world.run("support-bot-1")
    await world.settle()
    assert await world.reconcile() == 100


async def test_it_may_be_changed_while_the_job_runs() -> None:
    world = await started(World(make_job().build()))
    world.later(500)
    await world.settle()
    assert world.state == "Running"
    world.set_policy(activeDeadlineSeconds=400)
    await world.settle()
    assert world.state == "Failed"


async def test_the_profiles_limit_holds_for_jobs_that_say_nothing() -> None:
    world = World(make_job().build(), profiles=[make_profile(limits={"maxActiveDeadlineSeconds": 50})])
    await started(world)
    assert await world.reconcile() == 50


async def test_a_finished_job_goes_after_its_ttl() -> None:
    world = await started(World(make_job().with_policy(ttlSecondsAfterFinished=30).build()))
    world.complete("support-bot-0")
    assert await world.settle() == 30
    world.later(30)
    await world.settle()
    assert world.gone
    assert world.deleted == ["FineTuneJob/support-bot"]
    assert await world.reconcile() is None


async def test_a_failed_one_goes_too_and_none_without_a_ttl() -> None:
    world = World(make_job().with_policy(ttlSecondsAfterFinished=0).with_spec(colour="red").build())
    await world.settle()
    assert world.gone
    other = World(make_job().with_spec(colour="red").build())
    assert await other.settle() is None
    assert not other.gone
