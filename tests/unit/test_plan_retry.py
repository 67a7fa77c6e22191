"""What an ended attempt leads to."""

import datetime

import pytest

from finetune_api.failures import Reason
from finetune_api.jobstatus import Attempt
from finetune_operator.attempts import KEEP, backoff, bounded, failures
from support.world import RESULT, START, World, make_job, rfc3339, started


async def test_a_retryable_end_is_followed_by_the_next_attempt_after_a_pause() -> None:
    world = await started(World(make_job().build()))
    world.later(100)
    world.fail("support-bot-0", Reason.RANK_FAILED, "rank 1 died", rank=1, exit_code=-9, resumed_from_step=None)
    pause = backoff("job-uid", 1).total_seconds()
    assert await world.settle() == pause
    assert world.state == "Retrying"
    assert "rank 1 died" in (world.status.message or "")
    [first] = world.status.attempts
    assert (first.outcome, first.reason, first.rank, first.exit_code) == ("Retryable", "RankFailed", 1, -9)
    assert first.node == "node-0"
    world.later(pause - 1)
    await world.settle()
    assert world.state == "Retrying"
    world.later(1)
    await world.settle()
    assert world.state == "Starting"
    assert world.names("Job") == ["support-bot-0", "support-bot-1", "support-bot-prepare"]
    assert [a.number for a in world.status.attempts] == [0, 1]


async def test_attempts_are_bounded_and_the_last_cause_is_told() -> None:
    world = await started(World(make_job().with_policy(maxAttempts=2).build()))
    world.fail("support-bot-0", Reason.HUNG, "no step in 300 s")
    await world.settle()
    world.later(60)
    await world.settle()
    world.run("support-bot-1")
    world.fail("support-bot-1", Reason.OUT_OF_MEMORY, "tried to allocate 2 GiB")
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "MaxAttemptsReached"
    assert "2 attempts failed" in failed.message
    assert "OutOfMemory" in failed.message
    assert "tried to allocate 2 GiB" in failed.message
    assert len(world.names("Job")) == 3


async def test_a_preemption_costs_no_attempt() -> None:
    world = await started(World(make_job().with_policy(maxAttempts=1).build()))
    for number in range(3):
        world.run(f"support-bot-{number}")
        world.fail(f"support-bot-{number}", Reason.PREEMPTED, "SIGTERM")
        await world.settle()
        assert world.state == "Starting"
    assert failures(world.status.attempts) == 0
    assert world.status.attempts[-1].number == 3


async def test_a_job_that_somebody_deleted_is_tried_again() -> None:
    world = await started(World(make_job().build()))
    del world.objects["Job", "support-bot-0"]
    world.sweep("support-bot-0")
    await world.settle()
    assert world.status.attempts[0].outcome == "Preempted"
    assert world.names("Job") == ["support-bot-1", "support-bot-prepare"]


async def test_the_next_attempt_waits_for_the_pods_of_the_one_before() -> None:
    world = await started(World(make_job().build()))
    del world.objects["Job", "support-bot-0"]
    assert await world.settle() == 20
    assert (world.state, world.names("Job")) == ("Starting", ["support-bot-prepare"])
    assert "waits for support-bot-0-0-x" in (world.status.message or "")
    world.objects["Pod", "support-bot-0-0-x"]["status"]["phase"] = "Failed"
    await world.settle()
    assert "support-bot-1" in world.names("Job")


async def test_a_node_that_does_not_answer_costs_an_attempt() -> None:
    world = await started(World(make_job().build()))
    pod = world.objects["Pod", "support-bot-0-0-x"]
    pod["metadata"]["deletionTimestamp"] = rfc3339(world.now + datetime.timedelta(seconds=120))
    assert await world.settle() == 180
    assert world.state == "Running"
    world.later(180)
    await world.settle()
    [attempt] = world.status.attempts
    assert (attempt.outcome, attempt.reason, attempt.node) == ("Retryable", "NodeLost", "node-0")
    assert world.deleted_jobs == ["Job/support-bot-0"]
    world.later(60)
    await world.settle()
    assert "support-bot-1" in world.names("Job")


@pytest.mark.parametrize("failed", range(1, 12))
def test_the_pause_grows_and_is_the_same_each_time(failed: int) -> None:
    pause = backoff("uid", failed)
    low = min(10 * 2 ** (failed - 1), 600)
    assert datetime.timedelta(seconds=low) <= pause <= datetime.timedelta(seconds=low * 1.25)
    assert pause == backoff("uid", failed)


def test_jobs_do_not_come_back_at_once() -> None:
    assert len({backoff(f"uid-{i}", 8) for i in range(50)}) > 20


def test_preemptions_are_forgotten_before_failures() -> None:
    many = [
        Attempt(number=n, job=f"j-{n}", start_time=START, outcome="Retryable" if n % 10 == 0 else "Preempted")
        for n in range(400)
    ]
    kept = bounded(many)
    assert len(kept) == KEEP
    assert failures(kept) == failures(many) == 40
    assert kept[-1].number == 399


async def test_a_gate_that_is_not_met_fails_the_job_and_keeps_what_was_published() -> None:
    world = await started(World(make_job().build()))
    text = "evaluation.gates[0]: rougeL is 0.21; at least 0.3 is wanted"
    metrics = {"rougeL": 0.21, "evalLoss": 1.5} | {f"evalLoss.d.s{i}": 1.0 for i in range(300)}
    result = RESULT.model_copy(update={"metrics": metrics})
    world.fail("support-bot-0", Reason.GATE_NOT_MET, text, exit_code=78, result=result)
    await world.settle()
    assert world.state == "Failed"
    failed = world.status.condition("Failed")
    assert failed
    assert (failed.status, failed.reason, failed.message) == ("True", "GateNotMet", text)
    assert world.status.message == text
    [attempt] = world.status.attempts
    assert (attempt.outcome, attempt.reason, attempt.exit_code) == ("Permanent", "GateNotMet", 78)
    assert world.status.result
    assert (world.status.result.uri, world.status.result.metrics["rougeL"]) == (RESULT.uri, 0.21)
    assert 2 < len(world.status.result.metrics) <= 128
    assert world.names("Job") == ["support-bot-0", "support-bot-prepare"]


async def test_another_permanent_end_has_no_result() -> None:
    world = await started(World(make_job().build()))
    world.fail("support-bot-0", Reason.DIVERGED, "the loss is not a number")
    await world.settle()
    assert (world.state, world.status.result) == ("Failed", None)
