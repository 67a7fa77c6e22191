"""What follows where a GPU's memory was too small: once, half the micro-batch and twice the accumulation."""

import json
from typing import Any

from finetune_api.failures import Reason
from finetune_api.run import PreparedSummary, StageSummary
from support.world import PREPARED, Object, World, make_job, make_profile

GPU = make_profile(accelerator={"memory": "80Gi"})


async def trains(micro: int = 4, prepared: PreparedSummary = PREPARED, **spec: Any) -> World:
    """Attempt 0 runs: 32 examples a step on two workers."""
    wanted = {"distribution": {"workers": 2}, "training": {"globalBatchSize": 32, "microBatchSize": micro}} | spec
    world = World(make_job().with_spec(**wanted).build(), profiles=[GPU])
    await world.settle()
    world.prepared(prepared)
    await world.settle()
    world.run("support-bot-0")
    await world.settle()
    return world


async def again(world: World, number: int, reason: Reason = Reason.OUT_OF_MEMORY) -> None:
    """The attempt ends so, and the next one runs, if there is one."""
    world.fail(f"support-bot-{number}", reason, "tried to allocate 2 GiB")
    if pause := await world.settle():
        world.later(pause)
        await world.settle()
    if ("Job", f"support-bot-{number + 1}") in world.objects:
        world.run(f"support-bot-{number + 1}")
        await world.settle()


def told(world: World, number: int) -> Object:
    """What the pods of an attempt are told."""
    run: Object = json.loads(world.objects["ConfigMap", f"support-bot-{number}"]["data"]["run.json"])
    return run


def batches(sizing: Object) -> tuple[int, int]:
    return sizing["microBatchSize"], sizing["gradientAccumulation"]


async def test_half_the_micro_batch_and_twice_the_accumulation() -> None:
    world = await trains()
    before = told(world, 0)
    assert batches(before["sizing"]) == (4, 4)
    world.fail("support-bot-0", Reason.OUT_OF_MEMORY, "tried to allocate 2 GiB")
    pause = await world.settle()
    assert world.state == "Retrying"
    text = "micro-batch 2 instead of 4 and gradient accumulation 8 instead of 4"
    assert f"UTC with {text}; OutOfMemory: tried to allocate 2 GiB" in (world.status.message or "")
    assert any(event["reason"] == "Resized" and text in event["message"] for event in world.events)
    assert pause
    world.later(pause)
    await world.settle()
    after = told(world, 1)
    assert batches(after["sizing"]) == (2, 8)
    assert after["sizing"]["memoryPerGPU"] < before["sizing"]["memoryPerGPU"]
    assert world.status.sizing
    assert (world.status.sizing.micro_batch_size, world.status.sizing.gradient_accumulation) == (2, 8)
    # The checkpoint is resumed under the same hash, and the user's spec stays the user's.
    assert {key: after[key] for key in ("spec", "specSha256")} == {key: before[key] for key in ("spec", "specSha256")}


async def test_a_second_one_is_final_also_after_other_ends() -> None:
    world = await trains()
    await again(world, 0)
    await again(world, 1, Reason.PREEMPTED)
    await again(world, 2, Reason.HUNG)
    assert batches(told(world, 3)["sizing"]) == (2, 8)
    await again(world, 3)
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "OutOfMemory"
    assert "half of that which was too much before; a shorter training.maxLength" in failed.message
    assert [a.outcome for a in world.status.attempts] == ["Retryable", "Preempted", "Retryable", "Permanent"]


async def test_less_than_one_example_cannot_be_taken() -> None:
    world = await trains(micro=1)
    await again(world, 0)
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "OutOfMemory"
    assert "tried to allocate 2 GiB; its micro-batch is 1 already; a shorter training.maxLength" in failed.message
    assert [a.outcome for a in world.status.attempts] == ["Permanent"]
    assert world.names("Job") == ["support-bot-0", "support-bot-prepare"]


async def test_an_odd_micro_batch_becomes_one_that_divides_the_batch() -> None:
    world = await trains(micro=9, training={"globalBatchSize": 18, "microBatchSize": 9})
    await again(world, 0)
    assert batches(told(world, 1)["sizing"]) == (3, 3)


async def test_the_sizing_of_every_stage_follows() -> None:
    one = StageSummary(train_tokens=10, max_tokens=200, target_features=4096, target_outputs=0)
    stages = [{"name": "first", "training": {"microBatchSize": 1}}, {"name": "second"}]
    world = await trains(prepared=PREPARED.model_copy(update={"stages": [one, one]}), stages=stages)
    assert [batches(sizing) for sizing in told(world, 0)["stageSizings"]] == [(1, 16), (4, 4)]
    await again(world, 0)
    assert [batches(sizing) for sizing in told(world, 1)["stageSizings"]] == [(1, 16), (2, 8)]
    assert batches(told(world, 1)["sizing"]) == (2, 8)
