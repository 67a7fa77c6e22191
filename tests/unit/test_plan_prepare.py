"""From the accepted job to data that is ready, or to the reason why it never will be."""

import datetime

import pytest

from finetune_api.failures import Reason, TerminationMessage
from finetune_api.run import RunConfig, StageSummary
from support.world import PREPARED, START, World, make_job, make_profile, rfc3339


async def test_prepare_comes_first_and_costs_four_writes() -> None:
    world = World(make_job().build())
    await world.settle()
    assert world.created == ["ConfigMap/support-bot-prepare", "Job/support-bot-prepare"]
    assert (world.state, world.writes) == ("Preparing", 4)
    world.run("support-bot-prepare")
    await world.settle()
    assert world.writes == 4
    assert [e["reason"] for e in world.events] == ["Preparing"]


async def test_the_data_and_the_sizing_are_told() -> None:
    world = World(make_job().build())
    await world.settle()
    world.prepared()
    await world.settle()
    data, sizing = world.status.data, world.status.sizing
    assert data
    assert sizing
    assert (data.train_examples, data.dropped, data.report_uri) == (1000, 3, PREPARED.report_uri)
    assert (sizing.strategy, sizing.micro_batch_size, sizing.gradient_accumulation) == ("DDP", 16, 1)
    assert "Prepared" in [e["reason"] for e in world.events]


STAGES = [{"name": "sft"}, {"name": "whole", "tuning": {"type": "Full"}, "training": {"globalBatchSize": 4}}]
PARTS = [
    StageSummary(train_tokens=10, max_tokens=100, target_features=PREPARED.model.target_features, target_outputs=0),
    StageSummary(train_tokens=10, max_tokens=0, target_features=0, target_outputs=0),
]


async def test_each_stage_is_sized_and_the_one_that_needs_most_is_shown() -> None:
    world = World(make_job().with_spec(stages=STAGES).build())
    await world.settle()
    world.prepared(PREPARED.model_copy(update={"stages": PARTS}))
    await world.settle()
    run = RunConfig.model_validate_json(world.objects["ConfigMap", "support-bot-0"]["data"]["run.json"])
    first, second = run.stage_sizings
    assert [s.micro_batch_size * s.gradient_accumulation for s in run.stage_sizings] == [16, 4]
    assert second.memory_per_gpu > first.memory_per_gpu
    assert world.status.sizing == run.sizing == second


async def test_a_stage_that_does_not_fit_is_named() -> None:
    long = STAGES[1] | {"training": {"globalBatchSize": 4, "maxLength": 131072}}
    job = make_job().with_spec(stages=[STAGES[0], long]).build()
    world = World(job, profiles=[make_profile(accelerator={"memory": "2Gi"})])
    await world.settle()
    parts = [PARTS[0], PARTS[1].model_copy(update={"max_tokens": 131072})]
    world.prepared(PREPARED.model_copy(update={"stages": parts}))
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "DoesNotFit"
    assert failed.message.startswith("stage whole: ")


@pytest.mark.parametrize(
    "reason",
    [Reason.DATA_INVALID, Reason.STORAGE_DENIED, Reason.MODEL_INVALID, Reason.STORAGE_UNAVAILABLE, Reason.DATA_LEAKAGE],
)
async def test_what_prepare_says_is_what_the_job_says(reason: Reason) -> None:
    world = World(make_job().build())
    await world.settle()
    world.fail("support-bot-prepare", reason, "s3://data/tickets.jsonl line 7: not JSON")
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == reason
    assert "s3://data/tickets.jsonl line 7: not JSON" in (world.status.message or "")
    assert world.names("Job") == ["support-bot-prepare"]
    assert world.status.attempts == []


async def test_the_last_try_of_prepare_counts() -> None:
    world = World(make_job().build())
    await world.settle()
    world.end("support-bot-prepare", message=TerminationMessage(reason=Reason.STORAGE_UNAVAILABLE, message="timeout"))
    first = world.objects.pop(("Pod", "support-bot-prepare-0-x"))
    world.objects["Pod", "an-earlier-one"] = {**first, "metadata": {**first["metadata"], "name": "an-earlier-one"}}
    world.later(30)
    world.end("support-bot-prepare", message=TerminationMessage(reason=Reason.STORAGE_DENIED, message="403"))
    world.finish("support-bot-prepare", "Failed", "BackoffLimitExceeded")
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "StorageDenied"


async def test_a_model_that_does_not_fit_asks_for_no_gpu() -> None:
    world = World(make_job().build(), profiles=[make_profile(accelerator={"memory": "1Gi"})])
    await world.settle()
    world.prepared()
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "DoesNotFit"
    assert world.names("Job") == ["support-bot-prepare"]


async def test_an_answer_that_was_lost_with_its_pod_is_asked_for_again() -> None:
    world = World(make_job().build())
    await world.settle()
    world.finish("support-bot-prepare", "Complete")
    world.later(10)
    await world.settle()
    assert world.deleted_jobs == ["Job/support-bot-prepare"]
    assert world.created.count("Job/support-bot-prepare") == 2
    world.prepared()
    await world.settle()
    assert world.names("Job") == ["support-bot-0", "support-bot-prepare"]


async def test_a_pod_that_ended_without_telling_is_no_endless_loop() -> None:
    world = World(make_job().build())
    await world.settle()
    world.end("support-bot-prepare", message=TerminationMessage())
    world.finish("support-bot-prepare", "Complete")
    await world.settle()
    assert world.state == "Failed"
    assert "without telling" in (world.status.message or "")


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}]},
            "Unschedulable",
            "support-bot-prepare-0-x: 0/3",
        ),
        (
            {
                "containerStatuses": [
                    {"name": "trainer", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}}
                ]
            },
            "ImagePullError",
            "ImagePullBackOff: no such tag",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "trainer",
                        "state": {
                            "waiting": {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}
                        },
                    }
                ]
            },
            "StorageDenied",
            'secret "x" not found',
        ),
    ],
)
async def test_why_a_pod_does_not_run_is_told_after_a_grace(
    status: dict[str, object], reason: str, message: str
) -> None:
    world = World(make_job().build())
    await world.settle()
    world.pod("support-bot-prepare")["status"] |= status
    writes = world.writes
    assert await world.settle() == 10
    assert world.writes == writes
    world.later(10)
    await world.settle()
    running = world.status.condition("Running")
    assert running
    assert (running.status, running.reason) == ("False", reason)
    assert message in (world.status.message or "")
    assert world.state == "Preparing"
    assert [e["type"] for e in world.events if e["reason"] == reason] == ["Warning"]


async def test_the_time_before_running_is_bounded() -> None:
    world = World(make_job().with_policy(preRunningDeadlineSeconds=60).build())
    assert await world.settle() == 60
    world.pod("support-bot-prepare")
    world.later(59)
    await world.settle()
    assert world.state == "Preparing"
    world.later(1)
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "PreRunningDeadlineExceeded"
    assert world.deleted_jobs == ["Job/support-bot-prepare"]


async def test_what_the_kernel_killed_for_its_memory_is_not_tried_again_unchanged() -> None:
    """Though the Job has tries left, and its controller would use them."""
    world = World(make_job().build())
    await world.settle()
    world.run("support-bot-prepare")
    await world.settle()
    world.end("support-bot-prepare", exitCode=137, reason="OOMKilled")
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "HostOutOfMemory"
    assert "the FineTuneProfile's spec.prepare.memory must be larger" in failed.message
    assert world.deleted_jobs == ["Job/support-bot-prepare"]


async def test_preparing_itself_may_take_longer() -> None:
    world = World(make_job().with_policy(preRunningDeadlineSeconds=60).build())
    await world.settle()
    world.run("support-bot-prepare")
    world.later(3600)
    await world.settle()
    assert world.state == "Preparing"
    world.prepared()
    await world.settle()
    assert world.state == "Starting"
    assert START + datetime.timedelta(hours=1) == world.now
    assert world.objects["Job", "support-bot-0"]["metadata"]["creationTimestamp"] == rfc3339(world.now)
