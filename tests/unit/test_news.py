"""What the operator hears and need not look into, and what it must."""

import asyncio
import copy
from collections.abc import Sequence

import pytest

from finetune_operator.cluster import ApiError
from finetune_operator.controller import child_of
from finetune_operator.news import ChildNews, JobNews, job_facts, pod_facts
from finetune_operator.observe import Census
from finetune_operator.profiles import FRESH_SECONDS, Profiles
from finetune_operator.reconcile import NotYet, glance
from finetune_operator.turns import Line
from support.world import CONTEXT, Object, World, make_job, make_profile, rfc3339, started

KEY = ("team-a", "support-bot")


def test_a_version_is_news_once() -> None:
    news = JobNews()
    assert news.heard(KEY, 1)
    assert not news.heard(KEY, 1)
    assert news.heard(KEY, 2)
    assert news.heard(("team-b", "support-bot"), 1)
    news.forget(KEY)
    assert news.heard(KEY, 2)


@pytest.mark.parametrize(
    ("meanwhile", "written", "work"),
    [
        ([], 2, False),
        ([2], 2, False),  # the echo came before the answer to the write
        ([2, 3], 2, True),  # somebody wrote after us
        ([7, 2], 2, False),  # somebody wrote before our read
        ([1], 1, False),  # nothing was written
        ([3], None, True),  # the reconcile failed
    ],
)
def test_what_is_heard_while_a_job_is_reconciled(meanwhile: list[int], written: int | None, work: bool) -> None:
    news = JobNews()
    news.heard(KEY, 1)
    news.begin(KEY)
    assert not any(news.heard(KEY, version) for version in meanwhile)
    assert news.done(KEY, written) == work


def test_echoes_that_come_late_are_none() -> None:
    news = JobNews()
    for version in (1, 2, 3):
        news.begin(KEY)
        assert not news.done(KEY, version)
    assert not any(news.heard(KEY, version) for version in (1, 2, 3))
    assert news.heard(KEY, 4)


async def test_which_changes_of_a_job_are_work() -> None:
    world, news = await started(World(make_job().build()), attempt_runs=False), ChildNews()
    job = copy.deepcopy(world.objects["Job", "support-bot-0"])
    job["metadata"]["generation"] = 1

    def heard(*, gone: bool = False) -> bool:
        return news.heard(job, job_facts(job, gone=gone), gone=gone)

    assert not heard()
    job["status"] = {"active": 2, "ready": 1}
    assert not heard()
    job["metadata"]["generation"] = 2  # a queue admits it
    assert heard()
    job["status"] = {"conditions": [{"type": "FailureTarget", "status": "True"}]}
    assert not heard()
    job["status"]["conditions"].append({"type": "Failed", "status": "True"})
    assert heard()
    assert not heard()
    assert heard(gone=True)


def test_a_child_that_is_over_when_it_is_first_heard_of_is_work() -> None:
    meta = {"uid": "u", "generation": 1}
    over = {"metadata": meta, "status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    assert ChildNews().heard(over, job_facts(over))


@pytest.mark.parametrize(("attempt", "work"), [("0", True), ("prepare", False)])
async def test_which_changes_of_a_pod_are_work(attempt: str, work: bool) -> None:
    """Those of `prepare` are none: its Job tells."""
    world, news = await started(World(make_job().build()), attempt_runs=False), ChildNews()
    name = f"support-bot-{attempt}"
    del world.objects["Pod", "support-bot-prepare-0-x"]

    def heard(*, gone: bool = False) -> bool:
        pod = world.pod(name)
        return news.heard(pod, pod_facts(pod, gone=gone), gone=gone)

    assert not heard()
    world.run(name)
    assert heard() is work
    assert not heard()
    world.end(name)
    assert not heard()
    world.pod(name)["metadata"]["deletionTimestamp"] = rfc3339(world.now)
    assert heard() is work
    assert heard(gone=True) is work


@pytest.mark.parametrize("attempt", ["0", "prepare"])
async def test_a_pod_in_trouble_is_work_and_one_that_is_out_of_it(attempt: str) -> None:
    world, news = await started(World(make_job().build()), attempt_runs=False), ChildNews()
    pod = world.pod(f"support-bot-{attempt}")
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"name": "trainer", "state": waiting}]}
    assert news.heard(pod, pod_facts(pod))
    world.run(f"support-bot-{attempt}")
    assert news.heard(pod, pod_facts(pod))


async def test_what_prepares_is_work_once_the_kernel_has_killed_it_for_its_memory() -> None:
    world, news = World(make_job().build()), ChildNews()
    await world.settle()
    world.run("support-bot-prepare")
    pod = world.pod("support-bot-prepare")
    assert not news.heard(pod, pod_facts(pod))
    world.end("support-bot-prepare", exitCode=137, reason="OOMKilled")
    assert news.heard(pod, pod_facts(pod))


async def test_a_job_that_was_created_but_not_recorded_is_found_where_nothing_is_created() -> None:
    world = await started(World(make_job().build()))
    world.job["status"]["attempts"] = []
    world.set_policy(suspend=True)
    await world.settle()
    assert world.state == "Suspended"
    assert world.names("Job") == ["support-bot-prepare"]


async def test_what_a_job_that_lost_its_status_had_is_taken_up_again() -> None:
    """`prepare` is what would be made, and so is the gang: nothing has to be done twice."""
    world = await started(World(make_job().build()))
    before = list(world.created)
    del world.job["status"]
    assert await world.reconcile() == 0.0
    assert await world.reconcile() == 0.0
    await world.settle()
    assert world.status.attempts[0].uid == world.objects["Job", "support-bot-0"]["metadata"]["uid"]
    assert (world.state, world.created) == ("Running", before)


async def test_a_gang_of_a_job_that_began_anew_is_found_by_the_look_at_all_jobs() -> None:
    world = await started(World(make_job().build()))
    del world.job["status"]
    world.profiles = [make_profile(environment=[{"name": "NEW", "value": "1"}])]
    with pytest.raises(NotYet, match="prepare is not what is to be made"):
        await world.reconcile()
    await world.reconcile()
    assert (world.state, world.names("Job")) == ("Preparing", ["support-bot-0", "support-bot-prepare"])
    assert await glance(world.job, census_of(world), CONTEXT, Profiles(world), Line()) is None
    await world.reconcile()
    assert world.names("Job") == ["support-bot-prepare"]


def census_of(world: World) -> Census:
    census = Census()
    for (kind, _), raw in world.objects.items():
        raw = copy.deepcopy(raw)
        raw["metadata"]["namespace"] = "team-a"
        if kind == "Job":
            census.add_job(raw)
    return census


class Counting(World):
    """Counts reads of profiles; they take a turn of the loop."""

    reads = 0
    failures = 0

    async def list_profiles(self) -> list[Object]:
        self.reads += 1
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise ApiError(0, "Unreachable", "connection refused")
        return [*self.profiles]


async def test_profiles_are_read_once_in_a_second_for_all() -> None:
    now = 100.0
    world = Counting(make_job().build())
    profiles = Profiles(world, lambda: now)

    async def names() -> list[str]:
        found: Sequence[Object] = await profiles.choice(None)
        return [profile["metadata"]["name"] for profile in found]

    assert await asyncio.gather(*(names() for _ in range(5))) == [["laptop"]] * 5
    world.profiles = [make_profile("changed")]
    now += FRESH_SECONDS / 2
    assert await names() == ["laptop"]
    now += FRESH_SECONDS / 2
    assert await names() == ["changed"]
    assert world.reads == 2
    assert await profiles.choice("nobody") == []


async def test_a_failed_read_of_profiles_is_not_kept() -> None:
    world = Counting(make_job().build())
    world.failures = 1
    profiles = Profiles(world, lambda: 0.0)
    with pytest.raises(ApiError):
        await profiles.choice(None)
    assert len(await profiles.choice(None)) == 1


@pytest.mark.parametrize("attempt", ["", "x", "-1", "1.5", "²"])
def test_a_job_that_somebody_labelled_like_ours_is_not_read(attempt: str) -> None:
    """One that cannot be read would end the look at everybody's."""
    labels = {"finetune.dev/job-name": "j", "finetune.dev/attempt": attempt}
    assert child_of({"metadata": {"namespace": "a", "name": "x", "labels": labels}}) is None
    ours = {"namespace": "a", "name": "x", "labels": labels | {"finetune.dev/attempt": "3"}}
    assert child_of({"metadata": ours}) is None
    owner = {"kind": "FineTuneJob", "uid": "u", "controller": True}
    assert child_of({"metadata": ours | {"ownerReferences": [owner]}}) == ("a", "j")


async def test_annotations_that_somebody_changed_keep_nobody_from_being_read() -> None:
    world = await started(World(make_job().build()))
    job, pod = world.objects["Job", "support-bot-0"], world.pod("support-bot-0")
    for raw in (job, pod):
        raw["metadata"]["annotations"] = dict.fromkeys(raw["metadata"]["annotations"], "x")
        raw["metadata"]["namespace"] = "team-a"
    census = Census()
    census.add_job(job)
    census.add_pod(pod)
    observed = census.of("job-uid", "team-a", "support-bot", world.status)
    assert [(child.attempt, child.queue) for child in observed.jobs] == [(0, None)]
    assert [pod.index for pod in observed.pods] == [None]
