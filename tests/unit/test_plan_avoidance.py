"""Nodes on which a job failed twice."""

import datetime
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.jobstatus import Attempt
from finetune_operator.attempts import AVOIDED_FOR, avoided
from support.world import START, Object, World, make_job, started

HOUR = datetime.timedelta(hours=1)


def ended(number: int, node: str | None, reason: Reason, after: datetime.timedelta = HOUR) -> Attempt:
    return Attempt(number=number, job=f"j-{number}", reason=reason, node=node, completion_time=START + after)


@pytest.mark.parametrize(
    ("reasons", "found"),
    [
        ((Reason.NODE_LOST, Reason.NODE_LOST), ["a"]),
        ((Reason.HUNG, Reason.RANK_FAILED), ["a"]),
        ((Reason.HUNG,), []),
        ((Reason.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY), []),
        ((Reason.PREEMPTED, Reason.HUNG), []),
        ((Reason.STORAGE_UNAVAILABLE, Reason.STORAGE_UNAVAILABLE), []),
    ],
)
def test_two_failures_that_point_at_a_node(reasons: tuple[Reason, ...], found: list[str]) -> None:
    assert avoided([ended(n, "a", reason) for n, reason in enumerate(reasons)], START + HOUR) == found


def test_failures_elsewhere_count_for_themselves_and_expire() -> None:
    attempts = [
        ended(0, "a", Reason.HUNG, HOUR),
        ended(1, "b", Reason.HUNG, 2 * HOUR),
        ended(2, "a", Reason.NODE_LOST, 3 * HOUR),
        ended(3, None, Reason.HUNG, 4 * HOUR),
        ended(4, None, Reason.HUNG, 5 * HOUR),
        ended(5, "b", Reason.RANK_FAILED, 6 * HOUR),
    ]
    assert avoided(attempts, START + 7 * HOUR) == ["a", "b"]
    assert avoided(attempts, START + HOUR + AVOIDED_FOR) == ["b"]
    assert avoided(attempts, START + 2 * HOUR + AVOIDED_FOR) == []


def test_a_job_that_fails_everywhere_still_runs_somewhere() -> None:
    attempts = [ended(n, f"node-{n // 2}", Reason.RANK_FAILED) for n in range(100)]
    assert len(avoided(attempts, START + HOUR)) == 32
    assert "node-49" in avoided(attempts, START + HOUR)


def affinity(world: World, number: int) -> Object:
    pods: Object = world.objects["Job", f"support-bot-{number}"]["spec"]["template"]["spec"]
    found: Object = pods.get("affinity", {}).get("nodeAffinity", {})
    return found


NOT_NODE_0 = {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-0"]}]}
STRICTLY = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [NOT_NODE_0]}}
RATHER = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": NOT_NODE_0}]}


async def failed_twice(**spec: Any) -> World:
    """Attempt 2 exists."""
    world = await started(World(make_job().with_policy(maxAttempts=9).with_spec(**spec).build()), attempt_runs=False)
    for number, reason in enumerate((Reason.HUNG, Reason.RANK_FAILED)):
        assert affinity(world, number) == {}
        world.admit(f"support-bot-{number}")
        world.run(f"support-bot-{number}")
        await world.settle()
        world.fail(f"support-bot-{number}", reason)
        await world.settle()
        world.later(60)
        await world.settle()
    return world


async def test_the_next_attempt_stays_away_from_it() -> None:
    world = await failed_twice()
    assert affinity(world, 2) == STRICTLY
    world.run("support-bot-2")
    await world.settle()
    world.fail("support-bot-2", Reason.PREEMPTED)
    world.later(AVOIDED_FOR.total_seconds())
    await world.settle()
    assert affinity(world, 3) == {}


async def test_where_there_is_no_other_it_is_better_than_none() -> None:
    """A cluster of one node: without room elsewhere the job would wait for a day."""
    world = await failed_twice()
    world.place("support-bot-2", 0)
    await world.settle()
    world.later(300)
    await world.settle()
    assert world.deleted_jobs == ["Job/support-bot-2"]
    assert "away from the nodes that failed" in (world.status.message or "")
    world.sweep("support-bot-2")
    world.later((await world.settle()) or 0)
    await world.settle()
    assert affinity(world, 3) == RATHER
    world.place("support-bot-3", 0)
    await world.settle()
    world.later(3000)
    await world.settle()
    assert world.status.attempts[-1].number == 3


async def test_a_queue_that_has_admitted_it_is_not_kept_waiting() -> None:
    world = await failed_twice(queue={"name": "team-a"})
    assert affinity(world, 2) == RATHER
