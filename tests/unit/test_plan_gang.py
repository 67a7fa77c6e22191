"""From prepared data to the published result."""

from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_operator.cluster import ApiError
from finetune_operator.reconcile import NotYet
from support.world import RESULT, Crash, World, make_job, make_profile, rfc3339, started


async def test_nine_writes_from_the_job_to_the_gang() -> None:
    world = await started(World(make_job().build()), attempt_runs=False)
    assert world.created[2:] == ["Service/support-bot-0", "ConfigMap/support-bot-0", "Job/support-bot-0"]
    assert world.writes == 9
    assert world.state == "Starting"
    [attempt] = world.status.attempts
    assert (attempt.number, attempt.job, attempt.outcome) == (0, "support-bot-0", None)
    assert attempt.uid == world.objects["Job", "support-bot-0"]["metadata"]["uid"]


async def test_nothing_is_written_at_rest() -> None:
    world = await started(World(make_job().build()))
    writes = world.writes
    world.later(10_000)
    assert await world.reconcile() is None
    assert world.writes == writes


async def test_it_runs_when_every_worker_does() -> None:
    world = World(make_job().with_spec(distribution={"workers": 2}).build())
    await started(world, attempt_runs=False)
    world.run("support-bot-0")
    world.pod("support-bot-0", 1)["status"] = {"phase": "Pending"}
    await world.settle()
    assert world.state == "Starting"
    world.later(5)
    world.run("support-bot-0")
    await world.settle()
    running = world.status.condition("Running")
    assert running
    assert (world.state, running.status) == ("Running", "True")
    assert world.status.attempts[0].start_time == world.now


@pytest.mark.parametrize(
    ("phase", "attempt", "state"),
    [
        ("Training", 0, "Running"),
        ("Evaluating", 0, "Evaluating"),
        ("Publishing", 0, "Publishing"),
        ("Publishing", 3, "Running"),
    ],
)
async def test_the_trainers_phase_refines_the_state(phase: str, attempt: int, state: str) -> None:
    world = await started(World(make_job().build()))
    world.job["status"]["trainerStatus"] = {"phase": phase, "attempt": attempt, "progressPercentage": 50}
    await world.settle()
    assert world.state == state
    assert world.job["status"]["trainerStatus"]["progressPercentage"] == 50


async def test_the_checkpoint_is_kept_from_what_the_trainer_told() -> None:
    world = await started(World(make_job().build()))
    known = {"uri": "s3://adapters/x/step-00000200/", "step": 200, "time": rfc3339(world.now)}
    world.job["status"]["trainerStatus"] = {"checkpoint": known}
    await world.settle()
    del world.job["status"]["trainerStatus"]
    await world.settle()
    assert world.status.checkpoint
    assert world.status.checkpoint.step == 200


async def test_complete_with_the_result_of_worker_0() -> None:
    world = await started(World(make_job().with_spec(distribution={"workers": 2}).build()))
    world.complete("support-bot-0")
    await world.settle()
    assert world.state == "Complete"
    assert world.status.result
    assert world.status.result.uri == RESULT.uri
    assert world.status.attempts[0].outcome == "Succeeded"
    assert world.status.completion_time == world.now
    stalled, reconciling = world.status.condition("Stalled"), world.status.condition("Reconciling")
    assert stalled
    assert reconciling
    assert (stalled.status, reconciling.status) == ("False", "False")
    assert world.names("Job") == ["support-bot-0", "support-bot-prepare"]


@pytest.mark.parametrize(("attempt", "shown"), [(0, True), (1, False)])
async def test_what_the_trainer_warns_of_stands_in_the_message(attempt: int, shown: bool) -> None:
    """Only the current attempt's."""
    world = await started(World(make_job().build()))
    sentence = "training falls, validation rises since step 40"
    world.job["status"]["trainerStatus"] = {"attempt": attempt, "warning": sentence}
    await world.settle()
    running = world.status.condition("Running")
    assert running
    assert running.message.endswith(f"; {sentence}") is shown
    world.complete("support-bot-0")
    await world.settle()
    complete = world.status.condition("Complete")
    assert complete
    assert complete.message == f"published {RESULT.uri}" + (f"; {sentence}" if shown else "")


async def test_a_finished_job_never_runs_again() -> None:
    world = await started(World(make_job().build()))
    world.complete("support-bot-0")
    await world.settle()
    before = (world.created[:], world.status)
    world.objects.clear()
    world.set_policy(suspend=True)
    await world.settle()
    world.set_policy(suspend=False)
    world.job["spec"]["colour"] = "red"
    await world.settle()
    assert (world.created, world.status) == before


async def test_a_queue_admits_the_gang() -> None:
    world = World(make_job().with_spec(queue={"name": "team-a", "priorityClassName": "batch"}).build())
    await started(world, attempt_runs=False)
    gang = world.objects["Job", "support-bot-0"]
    assert gang["spec"]["suspend"] is True
    assert gang["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert gang["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "batch"
    assert (world.state, world.status.message) == ("Queued", "attempt 0 waits for queue team-a")
    world.admit("support-bot-0")
    await world.settle()
    assert world.state == "Starting"
    world.run("support-bot-0")
    await world.settle()
    assert world.state == "Running"
    gang["spec"]["suspend"] = True  # taken back
    world.sweep("support-bot-0")
    await world.settle()
    assert world.state == "Queued"
    assert world.status.attempts[0].start_time is None


async def test_what_a_failed_list_hides_is_not_absent() -> None:
    world = await started(World(make_job().build()))
    before = (world.writes, world.status)
    for kind in ("Job", "Pod"):
        world.unreachable = (kind,)
        with pytest.raises(ApiError, match="Unreachable"):
            await world.reconcile()
    assert (world.writes, world.status) == before


def owned_by(name: str, uid: str, kind: str = "FineTuneJob") -> list[dict[str, Any]]:
    return [{"apiVersion": "finetune.dev/v1alpha1", "kind": kind, "name": name, "uid": uid, "controller": True}]


async def test_a_name_that_is_somebody_elses_fails_the_job() -> None:
    world = World(make_job().build())
    world.put({"kind": "ConfigMap", "metadata": {"name": "support-bot-prepare"}, "data": {}})
    await world.settle()
    assert world.state == "Failed"
    assert "ConfigMap team-a/support-bot-prepare exists and is not this job's" in (world.status.message or "")
    assert world.names("Job") == []


async def test_what_a_deleted_job_of_the_same_name_left_is_waited_for() -> None:
    world = World(make_job().build())
    owner = owned_by("support-bot", "earlier-uid")
    world.put({"kind": "ConfigMap", "metadata": {"name": "support-bot-prepare", "ownerReferences": owner}, "data": {}})
    with pytest.raises(NotYet, match="waits for garbage collection"):
        await world.reconcile()
    assert world.created == []
    del world.objects["ConfigMap", "support-bot-prepare"]
    await world.settle()
    assert world.state == "Preparing"


async def test_children_of_an_earlier_job_of_the_same_name_are_not_ours() -> None:
    world = await started(World(make_job().build()))
    world.job = make_job().with_meta(uid="another").build()
    with pytest.raises(NotYet):
        await world.reconcile()
    assert world.status.attempts == []


async def test_a_config_map_of_a_try_under_another_profile_is_replaced() -> None:
    world = World(make_job().build())
    world.crash_after = 2  # the record, and the ConfigMap
    with pytest.raises(Crash):
        await world.reconcile()
    world.profiles = [make_profile(storage={"region": "elsewhere"})]
    with pytest.raises(NotYet, match="ConfigMap support-bot-prepare is not what is to be made"):
        await world.reconcile()
    await world.settle()
    assert "elsewhere" in world.objects["ConfigMap", "support-bot-prepare"]["data"]["run.json"]


async def test_a_permanent_end_is_final() -> None:
    world = await started(World(make_job().build()))
    world.fail("support-bot-0", Reason.DIVERGED, "loss is NaN at step 12", step=12)
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "Diverged"
    assert "loss is NaN at step 12" in (world.status.message or "")
    assert world.names("Job") == ["support-bot-0", "support-bot-prepare"]


async def test_nothing_is_deleted_or_told_that_is_not_recorded() -> None:
    world = await started(World(make_job().build()))
    world.set_policy(suspend=True)
    patch_status, told = world.patch_status, len(world.events)

    async def overtaken(*args: Any) -> bool:
        world.changed()
        return await patch_status(*args)

    world.patch_status = overtaken  # type: ignore[method-assign]
    with pytest.raises(NotYet):
        await world.reconcile()
    assert (world.deleted, len(world.events)) == ([], told)
    world.patch_status = patch_status  # type: ignore[method-assign]
    await world.settle()
    assert world.deleted_jobs == ["Job/support-bot-0"]
