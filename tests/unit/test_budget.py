"""Budgets of GPU-hours: what counts, who waits, who is stopped, and when it begins anew."""

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.budget import account, period
from finetune_api.failures import Reason
from finetune_api.jobstatus import FineTuneJobStatus
from finetune_api.profile import Budget, FineTuneProfile, Usage
from finetune_operator.budgeting import remaining
from finetune_operator.budgets import Budgets
from finetune_operator.meter import Run, count
from finetune_operator.observe import Census
from finetune_operator.profiles import Profiles
from finetune_operator.reconcile import glance
from finetune_operator.turns import Line
from support.world import CONTEXT, START, Object, World, make_job, make_profile, rfc3339, started

UTC = datetime.UTC
MONTH = datetime.datetime(2026, 3, 1, tzinfo=UTC)
"""Begin of the month of START."""


@pytest.mark.parametrize(
    ("kind", "since", "until"),
    [
        ("Day", (2026, 12, 31), (2027, 1, 1)),
        ("Week", (2026, 12, 28), (2027, 1, 4)),
        ("Month", (2026, 12, 1), (2027, 1, 1)),
    ],
)
def test_periods_are_the_calendars(kind: Any, since: Any, until: Any) -> None:
    now = datetime.datetime(2027, 1, 1, 0, 30, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))
    expected = datetime.datetime(*since, tzinfo=UTC), datetime.datetime(*until, tzinfo=UTC)
    assert period(Budget(gpu_hours=1, period=kind), now) == expected


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(-900, 900), st.integers(0, 900)), max_size=6),
    st.lists(st.integers(1, 900), max_size=8),
)
def test_however_often_it_is_counted_the_sum_is_that_of_the_attempts(
    attempts: list[tuple[int, int, int]], looks: list[int]
) -> None:
    """Attempts before the period's begin count from there on. (Their ends are known when they are counted.)"""
    at = [MONTH + datetime.timedelta(seconds=s) for s in sorted({*looks, 2000})]
    known: dict[str, Usage] = {}
    for now in at:
        runs = []
        for gpus, start, seconds in attempts:
            begin, end = (MONTH + datetime.timedelta(seconds=s) for s in (start, start + seconds))
            if begin <= now:
                runs.append(Run("p", ("team-a", "j"), gpus, begin, end if end <= now else None))
        known |= {name: value for name, value in count(known, Budget(gpu_hours=1), runs, now).items() if value}
    total = sum(gpus * max(0, start + seconds - max(0, start)) for gpus, start, seconds in attempts)
    assert (known["team-a"].gpu_seconds if known else 0) == total


def test_a_new_period_begins_with_nothing_and_forgets_who_does_not_run() -> None:
    old = Usage(since=MONTH - datetime.timedelta(days=28), until=MONTH - datetime.timedelta(seconds=5), gpu_seconds=99)
    runs = [Run("p", ("team-b", "j"), 2, MONTH - datetime.timedelta(hours=1), None)]
    now = MONTH + datetime.timedelta(seconds=10)
    changed = count({"team-a": old, "team-b": old}, Budget(gpu_hours=1), runs, now)
    assert changed == {"team-a": None, "team-b": Usage(since=MONTH, until=now, gpu_seconds=20)}


class Look:
    """One look of the operator at one world's job, and the profile that comes of it."""

    def __init__(self, world: World) -> None:
        self.world, self.budgets = world, Budgets(world)

    async def __call__(self, *, there: bool = True) -> list[tuple[str, str]]:
        await self.budgets.begin()
        if there:
            self.budgets.look(self.world.job, self.world.now)
        return await self.budgets.settle(self.world.now)

    def spent(self) -> float:
        found = account(FineTuneProfile.model_validate(self.world.profiles[0]), "team-a", self.world.now)
        assert found
        return found.spent


def priced(hours: float, **spec: Any) -> World:
    """A job of four processes under a profile with a budget."""
    job = make_job().with_spec(distribution={"workers": 2, "gpusPerWorker": 2}, **spec)
    return World(job.build(), profiles=[make_profile(budget={"gpuHours": hours})])


async def test_what_runs_is_counted_and_stopped_when_the_budget_is_spent() -> None:
    world = await started(priced(2.0))
    look = Look(world)
    world.later(900)
    assert await look() == []
    assert look.spent() == 1.0
    due = await world.settle()
    assert due == 900
    world.later(900)
    assert await look() == [("team-a", "support-bot")]
    await world.settle()
    text = "profile 'laptop' gives namespace 'team-a' a budget for each month: 2 of 2 GPU-hours are spent"
    suspended = world.status.condition("Suspended")
    assert suspended
    assert (world.state, suspended.status, suspended.reason) == ("Suspended", "True", "BudgetExceeded")
    assert suspended.message.startswith(text)
    assert "from 2026-04-01 00:00 UTC" in suspended.message
    assert world.deleted_jobs == ["Job/support-bot-0"]
    [attempt] = world.status.attempts
    assert (attempt.outcome, attempt.reason) == ("Preempted", "BudgetExceeded")
    assert any(event["reason"] == "BudgetExceeded" for event in world.events)
    # It is over: no more is counted, and nothing begins.
    world.sweep("support-bot-0")
    world.later(3600)
    assert await look() == []
    assert look.spent() == 2.0
    due = await world.settle()
    assert due == (datetime.datetime(2026, 4, 1, tzinfo=UTC) - world.now).total_seconds()
    world.later(due)
    await world.settle()
    assert (world.state, len(world.status.attempts)) == ("Starting", 2)


async def test_it_is_stopped_in_time_though_nobody_has_counted() -> None:
    world = await started(priced(2.0))
    due = await world.settle()
    assert due == 1800
    world.later(due)
    await world.settle()
    assert world.state == "Suspended"


async def test_a_larger_budget_lets_it_go_on() -> None:
    world = await started(priced(1.0))
    world.later(900)
    await world.settle()
    assert world.state == "Suspended"
    world.sweep("support-bot-0")
    world.profiles[0]["spec"]["budget"]["gpuHours"] = 3
    await world.settle()
    assert (world.state, len(world.status.attempts)) == ("Starting", 2)
    assert any(event["reason"] == "Resumed" for event in world.events)


async def test_what_others_spent_keeps_a_job_from_starting() -> None:
    world = priced(2.0)
    usage = {"since": rfc3339(MONTH), "until": rfc3339(START), "gpuSeconds": 7200}
    world.profiles[0]["status"] = {"usage": {"team-a": usage}}
    await started(world, attempt_runs=False)
    assert (world.state, world.status.attempts) == ("Suspended", [])
    assert world.names("Job") == ["support-bot-prepare"]
    usage = world.profiles[0]["status"]["usage"]
    usage["team-b"] = usage.pop("team-a")
    await world.settle()
    assert world.state == "Starting"


async def test_a_job_that_is_deleted_has_spent_what_it_spent() -> None:
    world = await started(priced(2.0))
    look = Look(world)
    await look()
    world.later(450)
    look.budgets.gone(world.job, world.now)
    world.later(900)
    assert await look(there=False) == []
    assert look.spent() == 0.5
    assert await look(there=False) == []
    assert look.spent() == 0.5


async def test_what_could_not_be_written_is_counted_the_next_time() -> None:
    world = await started(priced(2.0))
    look = Look(world)
    await look()
    look.budgets.gone(world.job, world.now + datetime.timedelta(seconds=450))
    world.later(450)
    name = world.profiles[0]["metadata"]["name"]
    await look.budgets.begin()
    world.profiles[0]["metadata"]["name"] = "away"
    assert await look.budgets.settle(world.now) == []
    assert look.budgets._gone
    world.profiles[0]["metadata"]["name"] = name
    await look(there=False)
    assert look.spent() == 0.5


async def test_without_a_budget_nothing_is_read_or_written() -> None:
    world = await started(World(make_job().build()))
    world.later(900)
    assert await Look(world)() == []
    assert "status" not in world.profiles[0]


def gpu(tflops: float | None, hours: float, **spec: Any) -> World:
    accelerator = {"memory": "80Gi"} | ({"tflops": tflops} if tflops else {})
    profile = make_profile(accelerator=accelerator, budget={"gpuHours": hours})
    return World(make_job().with_spec(**spec).build(), profiles=[profile])


async def test_a_job_whose_estimate_is_more_than_a_period_has_is_refused() -> None:
    # 6 x 1M parameters x 50,000 tokens x 10 epochs at 1 MFLOPS.
    world = await started(gpu(1e-6, 500.0, training={"epochs": 10}), attempt_runs=False)
    failed = world.status.condition("Failed")
    assert failed
    assert (world.state, failed.reason) == ("Failed", "BudgetExceeded")
    assert "a budget for each month of 500 GPU-hours; an estimated 5" in failed.message
    assert world.names("Job") == ["support-bot-prepare"]


@pytest.mark.parametrize(("expected", "state"), [(0, "Starting"), (3600 * 100, "Suspended")])
async def test_running_jobs_are_expected_to_go_on(expected: int, state: str) -> None:
    world = gpu(1e-6, 700.0, training={"epochs": 10})
    usage = {"since": rfc3339(MONTH), "until": rfc3339(START), "expectedGpuSeconds": 1000 * expected}
    world.profiles[0]["status"] = {"usage": {"team-a": usage}}
    await started(world, attempt_runs=False)
    assert world.state == state
    estimate = world.status.sizing and world.status.sizing.estimated_gpu_hours
    assert estimate
    assert 500 < estimate < 650
    if state == "Suspended":
        assert "an estimated" in (world.status.message or "")
        assert "by its running jobs" in (world.status.message or "")


async def test_without_tflops_nothing_is_estimated() -> None:
    world = await started(gpu(None, 0.001, training={"epochs": 1000}), attempt_runs=False)
    assert world.state == "Starting"
    assert world.status.sizing
    assert world.status.sizing.estimated_gpu_hours is None


def status(**trainer: Any) -> FineTuneJobStatus:
    begun = {"number": 0, "job": "j-0", "gpus": 4, "startTime": rfc3339(START), "outcome": "Retryable"}
    ended = {"completionTime": rfc3339(START + datetime.timedelta(hours=1)), "reason": Reason.NODE_LOST.value}
    raw: Object = {"attempts": [begun | ended], "trainerStatus": trainer}
    raw["checkpoint"] = {"uri": "s3://bucket/x", "step": 80, "time": rfc3339(START)}
    return FineTuneJobStatus.model_validate(raw)


def test_a_job_that_ran_is_estimated_by_its_own_pace() -> None:
    """100 steps took 4 GPU-hours, the last 20 of them are to be done again."""
    ran = status(step=100, totalSteps=200)
    later = START + datetime.timedelta(hours=2)
    assert remaining(ran, tuple(ran.attempts), 99.0, later) == pytest.approx(4.8)
    silent = status()
    assert remaining(silent, tuple(silent.attempts), 99.0, START) == 99.0


async def test_metrics_tell_what_was_spent_by_the_last_look() -> None:
    world = await started(priced(2.0))
    look = Look(world)
    assert list(look.budgets.accounts(world.now)) == []
    for spent in (1.0, 2.0):
        world.later(900)
        await look()
        [(profile, namespace, told)] = look.budgets.accounts(world.now)
        assert (profile, namespace, told.allowed, told.spent) == ("laptop", "team-a", 2.0, spent)
    world.profiles[0]["spec"]["budget"]["gpuHours"] = 5
    await look()
    assert [told.allowed for _, _, told in look.budgets.accounts(world.now)] == [5.0]
    del world.profiles[0]["spec"]["budget"]
    await look()
    assert list(look.budgets.accounts(world.now)) == []


async def test_a_budget_that_nobody_can_spend_overflows_no_date() -> None:
    world = await started(priced(2**53))
    await world.settle()
    assert world.state == "Running"


async def test_a_gang_that_the_status_has_lost_is_looked_at_under_a_budget() -> None:
    world = await started(priced(2.0))
    world.later(60)
    world.job["status"] = {}
    census = Census()
    for (kind, _), raw in world.objects.items():
        meta = raw["metadata"] | {"namespace": "team-a"}
        if kind == "Job":
            census.add_job(raw)
        if kind == "Pod":
            census.add_pod(raw | {"metadata": meta})
    assert await glance(world.job, census, CONTEXT, Profiles(world), Line()) is None, "there is something to do"
