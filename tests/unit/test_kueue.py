"""A gang in a queue: why it waits, by what Kueue says of its Workload."""

from typing import Any

import pytest

from finetune_operator.kueue import told
from finetune_operator.observe import Census
from finetune_operator.profiles import Profiles
from finetune_operator.reconcile import glance
from finetune_operator.turns import Line
from support.world import CONTEXT, World, make_job, started

MADE = "2026-03-01T12:00:00Z"


def workload(*conditions: tuple[str, bool, str], active: bool = True, checks: Any = (), made: str = MADE) -> Any:
    said = [
        {"type": kind, "status": str(holds), "reason": "Pending", "message": text} for kind, holds, text in conditions
    ]
    status = {"conditions": said, "admissionChecks": list(checks)}
    return {"metadata": {"creationTimestamp": made}, "spec": {"active": active}, "status": status}


FULL = "couldn't assign flavors to pod set main:\n insufficient unused quota for nvidia.com/gpu in flavor a100"
CHECKS = [{"name": "provision", "state": "Pending", "message": "two nodes"}, {"name": "budget", "state": "Ready"}]


@pytest.mark.parametrize(
    ("workloads", "expected"),
    [
        (None, "the API server knows no Workloads; Kueue is not installed"),
        ([], "Kueue has not taken notice of it yet"),
        ([workload()], "no quota yet"),
        ([workload(("QuotaReserved", False, FULL))], "no quota yet: " + FULL.replace("\n ", " ")),
        ([workload(("QuotaReserved", False, ""))], "no quota yet: Pending"),
        ([workload(("QuotaReserved", True, ""))], "quota is reserved"),
        (
            [workload(("QuotaReserved", True, ""), checks=CHECKS)],
            "quota is reserved, and these checks are not ready: provision: two nodes",
        ),
        ([workload(("QuotaReserved", True, ""), ("Admitted", True, ""))], "admitted"),
        ([workload(("Evicted", True, "by hand"), active=False)], "deactivated: by hand"),
        (
            [workload(("Admitted", True, "")), workload(("QuotaReserved", False, "full"), made="2026-03-01T12:00:09Z")],
            "no quota yet: full",
        ),
        ([{"metadata": {}}], "no quota yet"),
    ],
)
def test_what_kueue_says(workloads: Any, expected: str) -> None:
    assert told(workloads) == expected


async def test_the_status_says_why_and_asks_again_in_a_minute() -> None:
    world = World(make_job().with_spec(queue={"name": "team-a"}).build())
    await started(world, attempt_runs=False)
    world.workloads = [workload(("QuotaReserved", False, "1 GPU more needed"))]
    assert (world.state, world.status.message) == ("Queued", "attempt 0 waits for queue team-a")
    assert await world.settle() == 5
    world.later(5)
    after = await world.settle()
    text = "attempt 0 waits for queue team-a: no quota yet: 1 GPU more needed"
    assert (world.state, world.status.message, after) == ("Queued", text, 60)
    # A look at all jobs asks no queue, and is no news.
    census = Census()
    for (kind, _), raw in world.objects.items():
        if kind == "Job":
            census.add_job(raw)
    assert await glance(world.job, census, CONTEXT, Profiles(world), Line())
    world.workloads = None
    world.later(60)
    await world.settle()
    assert "Kueue is not installed" in (world.status.message or "")
    world.admit("support-bot-0")
    await world.settle()
    assert (world.state, world.status.message) == ("Starting", "attempt 0 starts one worker")
