"""Whose turn it is where no queue decides: a namespace's limits, a fair order, and that all get their turn."""

import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.job import parse
from finetune_api.policy import judge
from finetune_api.profile import Concurrency, FineTuneProfile
from finetune_operator.turns import Claim, Line, turns
from support.manifests import job_manifest
from support.world import START, World, make_job, make_profile


def claim(name: str, gpus: int, second: int = 0, *, holds: bool = False, limits: Concurrency | None = None) -> Claim:
    """`name`: namespace/job."""
    namespace, job = name.split("/")
    since = START + datetime.timedelta(seconds=second)
    return Claim((namespace, job), "p", gpus, since, holds, START if holds else None, limits or Concurrency())


def called(line: Line) -> list[tuple[str, str]]:
    return [key for profile in line.profiles() for key in line.ready(profile)]


def next_ones(limits: Concurrency, *claims: Claim, served: dict[str, int] | None = None) -> list[str]:
    times = {name: START + datetime.timedelta(seconds=second) for name, second in (served or {}).items()}
    holds = [c for c in claims if c.holds]
    waits = [c._replace(limits=limits) for c in claims if not c.holds]
    return ["/".join(key) for key in turns(holds, waits, times, limits)]


def test_without_limits_nobody_waits() -> None:
    assert len(next_ones(Concurrency(), *(claim(f"a/{n}", 99) for n in range(9)))) == 9


def test_the_namespace_that_uses_least_comes_next_and_of_its_jobs_the_oldest() -> None:
    running = [claim("a/r", 2, holds=True), claim("b/r", 4, holds=True)]
    waiting = [claim("b/1", 1, 0), claim("a/2", 1, 2), claim("a/1", 1, 1), claim("c/1", 1, 9)]
    assert next_ones(Concurrency(gpus=9), *running, *waiting) == ["c/1", "a/1", "a/2"]


def test_of_equals_the_one_that_was_served_longest_ago_comes_next() -> None:
    """A namespace with a hundred jobs and one with a single job take turns, however old the hundred are."""
    waiting = [*(claim(f"a/{n}", 1, n) for n in range(9)), claim("b/1", 1, 50)]
    assert next_ones(Concurrency(gpus=1), *waiting, served={"a": 5, "b": 4}) == ["b/1"]
    assert next_ones(Concurrency(gpus=1), *waiting, served={"a": 5}) == ["b/1"]
    assert next_ones(Concurrency(gpus=1), *waiting, served={"b": 4}) == ["a/0"]


def test_nobody_overtakes_a_job_that_finds_no_room() -> None:
    running = [claim("b/r", 6, holds=True)]
    assert next_ones(Concurrency(gpus=8), *running, claim("a/big", 4, 0), claim("b/small", 1, 1)) == []


def test_a_namespace_at_its_own_limit_keeps_no_other_waiting() -> None:
    limits = Concurrency(gpus=8, jobs_per_namespace=1)
    running = [claim("a/r", 1, holds=True)]
    assert next_ones(limits, *running, claim("a/1", 1, 0), claim("b/1", 2, 1), claim("b/2", 2, 2)) == ["b/1"]
    limits = Concurrency(gpus_per_namespace=4)
    assert next_ones(limits, *running, claim("a/1", 4, 0), claim("a/2", 1, 1), claim("b/1", 4, 2)) == ["b/1"]


jobs = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=12)
bounds = st.builds(
    Concurrency,
    gpus=st.none() | st.integers(4, 8),
    gpus_per_namespace=st.none() | st.integers(4, 6),
    jobs_per_namespace=st.none() | st.integers(1, 3),
)


@settings(deadline=None)
@given(jobs, bounds)
def test_limits_hold_and_everybody_has_a_turn(wanted: list[tuple[str, int, int]], limits: Concurrency) -> None:
    """Jobs of some GPUs and length, all asking at every tick, in any order of asking."""
    line = Line()
    waiting = {f"{ns}/{n}": claim(f"{ns}/{n}", gpus, n, limits=limits) for n, (ns, gpus, _) in enumerate(wanted)}
    left = {name: wanted[int(name.split("/")[1])][2] for name in waiting}
    running: dict[str, Claim] = {}
    for tick in range(100):
        for name in [name for name in running if left[name] == 0]:
            line.note(running.pop(name).key, None)
        now = START + datetime.timedelta(seconds=tick)
        for name, asks in sorted(waiting.items(), reverse=True):
            reason = line.why_not(asks)
            line.note(asks.key, asks if reason else asks._replace(holds=True, served=now))
            if reason is None:
                running[name] = waiting.pop(name)
        used = {ns: [c.gpus for c in running.values() if c.namespace == ns] for ns in "abc"}
        assert limits.gpus is None or sum(map(sum, used.values())) <= limits.gpus
        assert all(limits.gpus_per_namespace is None or sum(own) <= limits.gpus_per_namespace for own in used.values())
        assert all(limits.jobs_per_namespace is None or len(own) <= limits.jobs_per_namespace for own in used.values())
        for name in running:
            left[name] -= 1
    assert not waiting


def test_whose_turn_has_come_is_called_once() -> None:
    line, limits = Line(), Concurrency(gpus=2)
    first, second = claim("a/1", 2, limits=limits), claim("b/1", 2, 1, limits=limits)
    line.note(first.key, first._replace(holds=True))
    line.note(second.key, second)
    assert called(line) == []
    line.note(first.key, None)
    assert called(line) == [second.key]
    assert called(line) == []
    line.note(second.key, second._replace(holds=True))
    assert called(line) == []
    line.note(second.key, second)
    assert called(line) == [second.key]


def test_other_limits_hold_as_soon_as_a_profile_has_them() -> None:
    line, few = Line(), Concurrency(jobs_per_namespace=1)
    running, waiting = claim("a/1", 1, holds=True), claim("a/2", 1, limits=few)
    line.note(running.key, running)
    line.note(waiting.key, waiting)
    assert line.why_not(waiting) == "profile 'p' lets namespace 'a' run 1 job at a time"
    more = waiting._replace(limits=Concurrency(jobs_per_namespace=2))
    assert line.why_not(more) is None
    line.note(more.key, more)
    assert called(line) == [more.key]


# In the operator.


def world(line: Line, name: str, namespace: str, concurrency: dict[str, Any], **spec: Any) -> World:
    job = make_job(name).with_meta(namespace=namespace, uid=f"uid-{namespace}-{name}").with_spec(**spec)
    return World(job.build(), profiles=[make_profile(concurrency=concurrency)], line=line)


async def ready(*worlds: World) -> None:
    for each in worlds:
        await each.settle()
        each.prepared()
        await each.settle()


async def test_the_second_job_of_a_namespace_waits_for_the_first_and_others_do_not() -> None:
    line, limits = Line(), {"jobsPerNamespace": 1}
    first, second, other = (world(line, n, ns, limits) for n, ns in (("a", "team-a"), ("b", "team-a"), ("c", "team-b")))
    await ready(first, second, other)
    assert [each.state for each in (first, second, other)] == ["Starting", "Queued", "Starting"]
    assert second.names("Job") == ["b-prepare"]
    text = "attempt 0 waits for its turn: profile 'laptop' lets namespace 'team-a' run 1 job at a time"
    assert second.status.message == text
    first.run("a-0")
    await first.settle()
    await second.settle()
    assert second.state == "Queued"
    assert called(line) == []
    first.complete("a-0")
    await first.settle()
    assert called(line) == [("team-a", "b")]
    await second.settle()
    assert second.state == "Starting"


@pytest.mark.parametrize("how", ["suspended", "deleted", "given back"])
async def test_who_holds_nothing_any_more_makes_room(how: str) -> None:
    line, limits = Line(), {"gpus": 2}
    workers = {"distribution": {"workers": 2}}
    first, second = (world(line, n, ns, limits, **workers) for n, ns in (("a", "team-a"), ("b", "team-b")))
    await ready(first, second)
    assert (first.state, second.state) == ("Starting", "Queued")
    assert "come first for the 2 GPUs that profile 'laptop' lets be used at a time" in (second.status.message or "")
    if how == "suspended":
        first.set_policy(suspend=True)
    elif how == "deleted":
        first.gone = True
    else:
        first.place("a-0", 1)
        await first.settle()
        first.later(300)
    await first.settle()
    assert called(line) == [("team-b", "b")]
    await second.settle()
    assert second.state == "Starting"


async def test_a_new_operator_learns_who_holds_what() -> None:
    limits = {"jobsPerNamespace": 1}
    before, after = Line(), Line()
    first, second = (world(before, name, "team-a", limits) for name in ("a", "b"))
    await ready(first)
    first.run("a-0")
    await first.settle()
    first.line = second.line = after
    await first.settle()
    await ready(second)
    assert (first.state, second.state) == ("Running", "Queued")


async def test_waiting_for_its_turn_is_waiting_before_it_runs() -> None:
    line, limits = Line(), {"jobsPerNamespace": 1}
    first = world(line, "a", "team-a", limits)
    second = world(line, "b", "team-a", limits, runPolicy={"preRunningDeadlineSeconds": 60})
    await ready(first, second)
    due = await second.settle()
    assert due == 60
    second.later(60)
    await second.settle()
    failed = second.status.condition("Failed")
    assert failed
    assert failed.reason == "PreRunningDeadlineExceeded"
    assert "waits for its turn" in failed.message


async def test_a_queue_has_its_own_order() -> None:
    line, limits = Line(), {"jobsPerNamespace": 1}
    first, second = (world(line, name, "team-a", limits, queue={"name": "q"}) for name in ("a", "b"))
    third = world(line, "c", "team-a", limits)
    await ready(first, second, third)
    assert [each.status.message for each in (first, second)] == ["attempt 0 waits for queue q"] * 2
    for each in (first, second):
        each.admit(f"{each.job['metadata']['name']}-0")
        await each.settle()
    assert [each.state for each in (first, second, third)] == ["Starting"] * 3


@pytest.mark.parametrize("limits", [{"gpus": 3}, {"gpusPerNamespace": 3, "gpus": 9}])
def test_a_job_that_could_never_have_its_turn_is_refused(limits: dict[str, int]) -> None:
    profile = FineTuneProfile.model_validate(make_profile(concurrency=limits))
    wide = {"distribution": {"workers": 4}}
    (problem,) = judge(parse(job_manifest(**wide)), profile)
    assert str(problem) == (
        "spec.distribution: found 4; profile 'laptop' allows at most 3 at a time as workers x gpusPerWorker"
    )
    assert judge(parse(job_manifest(**wide, queue={"name": "q"})), profile) == []
