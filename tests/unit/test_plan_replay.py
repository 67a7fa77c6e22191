"""The operator dies after any one of its writes, in any story: the end is the same, and nothing exists twice."""

import copy
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.failures import Reason
from finetune_operator.accept import Subject
from finetune_operator.observe import observe
from finetune_operator.plan import Plan, plan
from support.world import CONTEXT, World, make_job

Story = Callable[[World], Awaitable[None]]


async def smooth(world: World) -> None:
    await world.settle()
    world.prepared()
    await world.settle()
    world.run("support-bot-0")
    await world.settle()
    world.complete("support-bot-0")
    await world.settle()


async def stony(world: World) -> None:
    """Fails, is suspended and resumed, completes, and goes by its ttl."""
    world.set_policy(ttlSecondsAfterFinished=60)
    await world.settle()
    world.prepared()
    await world.settle()
    world.run("support-bot-0")
    await world.settle()
    world.fail("support-bot-0", Reason.HUNG)
    await world.settle()
    world.later(60)
    await world.settle()
    world.run("support-bot-1")
    await world.settle()
    world.set_policy(suspend=True)
    await world.settle()
    world.sweep("support-bot-1")
    world.set_policy(suspend=False)
    await world.settle()
    world.complete("support-bot-2")
    await world.settle()
    world.later(60)
    await world.settle()


async def hopeless(world: World) -> None:
    world.set_policy(maxAttempts=2, activeDeadlineSeconds=500)
    await world.settle()
    world.prepared()
    await world.settle()
    world.fail("support-bot-0", Reason.RANK_FAILED)
    await world.settle()
    world.later(60)
    await world.settle()
    world.run("support-bot-1")
    await world.settle()
    world.later(500)
    await world.settle()


async def crowded(world: World) -> None:
    """Half of the gang finds room, twice; then fewer workers do, and a node that failed twice is left out."""
    world.job["spec"]["distribution"] = {"workers": 4, "minWorkers": 2}
    world.set_policy(preRunningDeadlineSeconds=500)
    await world.settle()
    world.prepared()
    await world.settle()
    for number, seconds, pause in ((0, 300, 20), (1, 200, 0)):
        world.place(f"support-bot-{number}", 2)
        await world.settle()
        world.later(seconds)
        await world.settle()
        world.sweep(f"support-bot-{number}")
        await world.settle()
        world.later(pause)
        await world.settle()
    for number in (2, 3):
        world.run(f"support-bot-{number}")
        await world.settle()
        world.fail(f"support-bot-{number}", Reason.NODE_LOST)
        await world.settle()
        world.later(60)
        await world.settle()
    world.run("support-bot-4")
    await world.settle()
    world.complete("support-bot-4")
    await world.settle()


async def often_preempted(world: World) -> None:
    await world.settle()
    world.prepared()
    await world.settle()
    for number in range(5):
        world.run(f"support-bot-{number}")
        await world.settle()
        world.fail(f"support-bot-{number}", Reason.PREEMPTED)
        await world.settle()


def outcome(world: World) -> object:
    attempts = [(a.number, a.job, a.outcome, a.reason) for a in world.status.attempts]
    return world.state, attempts, world.names("Job"), world.names("Service"), world.names("ConfigMap"), world.gone


@pytest.mark.parametrize("story", [smooth, stony, hopeless, crowded, often_preempted])
async def test_a_crash_after_any_write_leads_to_the_same_end(story: Story) -> None:
    straight = World(make_job().build())
    await story(straight)
    for write in range(1, straight.writes + 1):
        world = World(make_job().build(), crash_after=write)
        await story(world)
        assert outcome(world) == outcome(straight), f"crashed after write {write}"
        twice = [name for name, count in Counter(world.created).items() if count > 1]
        assert not twice, f"crashed after write {write}"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["settle", "later", "run", "fail", "preempt", "diverge", "complete", "delete", "suspend", "resume"]
        ),
        max_size=14,
    ),
    st.lists(st.integers(1, 40), max_size=3),
)
async def test_whatever_happens_the_plan_is_stable(steps: list[str], crashes: list[int]) -> None:
    """At every moment: the same arguments give the same plan; carried out, the next one is empty; numbers only grow."""
    world = World(make_job().with_policy(maxAttempts=3).build())
    dying = iter(sorted(crashes))
    for step in ["settle", *steps, "resume", "settle"]:
        world.crash_after = world.writes + next(dying, 10_000)
        happen(world, step)
        await world.settle()
        assert_stable(world)
    numbers = [a.number for a in world.status.attempts]
    assert numbers == sorted(set(numbers))
    assert sum(a.outcome is None for a in world.status.attempts) <= 1


def happen(world: World, step: str) -> None:
    running = [n for n in world.names("Job") if not world.objects["Job", n].get("status")]
    job = running[-1] if running else None
    if step == "later":
        world.later(700)
    elif step == "suspend":
        world.set_policy(suspend=True)
    elif step == "resume":
        world.set_policy(suspend=False)
    elif job == "support-bot-prepare":
        world.prepared()
    elif job and step == "run":
        world.run(job)
    elif job and step in ("fail", "preempt", "diverge"):
        world.fail(job, {"fail": Reason.HUNG, "preempt": Reason.PREEMPTED, "diverge": Reason.DIVERGED}[step])
    elif job and step == "complete":
        world.complete(job)
    elif job and step == "delete":
        del world.objects["Job", job]
        world.sweep(job)
    for name in [n for k, n in world.objects if k == "Pod"]:
        owner = world.objects["Pod", name]["metadata"]["ownerReferences"][0]["uid"]
        if owner not in {o["metadata"]["uid"] for (k, _), o in world.objects.items() if k == "Job"}:
            del world.objects["Pod", name]  # the garbage collector


def assert_stable(world: World) -> None:
    def decide() -> Plan:
        jobs = [o for (k, _), o in world.objects.items() if k == "Job"]
        pods = [o for (k, _), o in world.objects.items() if k == "Pod"]
        subject = Subject.read(copy.deepcopy(world.job))
        observed = observe("job-uid", subject.name, subject.status, jobs, pods)
        return plan(subject, world.profiles, observed, world.now, CONTEXT)

    first, second = decide(), decide()
    assert first == second
    assert not first.create
    assert not first.delete
    assert first.status == world.status
