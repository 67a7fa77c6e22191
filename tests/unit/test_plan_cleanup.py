"""What is left of attempts that are over: of few of them something to read, of the others nothing."""

from finetune_api.failures import Reason
from finetune_operator.plan import KEEP_ENDED
from support.world import RESULT, World, make_job, started


async def preempted(world: World, times: int) -> World:
    for number in range(times):
        world.run(f"support-bot-{number}")
        await world.settle()
        world.fail(f"support-bot-{number}", Reason.PREEMPTED, "SIGTERM")
        await world.settle()
    return world


async def test_of_many_attempts_the_newest_are_kept_for_their_logs() -> None:
    world = await preempted(await started(World(make_job().build()), attempt_runs=False), 6)
    gangs = [f"support-bot-{number}" for number in range(6 - KEEP_ENDED, 7)]
    assert world.names("Job") == [*gangs, "support-bot-prepare"]
    assert world.names("Service") == gangs
    assert world.names("ConfigMap") == [*gangs, "support-bot-prepare"]
    # What they came to is still told.
    assert [attempt.number for attempt in world.status.attempts] == list(range(7))
    world.complete("support-bot-6")
    await world.settle()
    assert world.status.result
    assert (world.state, world.status.result.uri) == ("Complete", RESULT.uri)
    assert world.names("Job") == [*gangs[-KEEP_ENDED:], "support-bot-prepare"]


async def test_what_was_stopped_leaves_nothing_and_what_was_prepared_stays() -> None:
    world = await started(World(make_job().build()))
    world.set_policy(suspend=True)
    await world.settle()
    assert world.deleted == ["Service/support-bot-0", "ConfigMap/support-bot-0", "Job/support-bot-0"]
    assert (world.names("Job"), world.names("ConfigMap")) == (["support-bot-prepare"], ["support-bot-prepare"])


async def test_somebody_elses_object_of_the_same_name_is_left_alone() -> None:
    world = await started(World(make_job().build()))
    del world.objects["Service", "support-bot-0"]
    world.put({"kind": "Service", "metadata": {"name": "support-bot-0"}})
    world.set_policy(suspend=True)
    await world.settle()
    assert world.names("Service") == ["support-bot-0"]
    assert world.deleted == ["ConfigMap/support-bot-0", "Job/support-bot-0"]
