"""Tenants may write Jobs and pods in their namespace: what they put there decides nothing but the end of their own."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_operator.cluster import ApiError
from finetune_operator.reconcile import NotYet
from support.world import Object, World, make_job, make_profile, started

PROFILE = {"limits": {"maxActiveDeadlineSeconds": 600}, "concurrency": {"gpus": 1}}


def forged(world: World, name: str, gpus: int = 1_000_000) -> Object:
    """A Job like ours, by somebody who may create Jobs and owns the FineTuneJob."""
    return world.put(
        {
            "kind": "Job",
            "metadata": {
                "name": name,
                "labels": {
                    "app.kubernetes.io/managed-by": "finetune-operator",
                    "finetune.dev/job-name": "support-bot",
                    "finetune.dev/attempt": name.rpartition("-")[2],
                },
                "annotations": {
                    "finetune.dev/profile": "another",
                    "finetune.dev/gpus": str(gpus),
                    "finetune.dev/profile-snapshot": json.dumps({"maxActiveDeadlineSeconds": 10**15}),
                },
                "ownerReferences": [
                    {
                        "apiVersion": "finetune.dev/v1alpha1",
                        "kind": "FineTuneJob",
                        "name": "support-bot",
                        "uid": "job-uid",
                        "controller": True,
                    }
                ],
            },
            "spec": {"completions": gpus, "parallelism": gpus},
        }
    )


async def test_a_forged_gang_is_not_adopted_and_goes() -> None:
    world = World(make_job().build(), profiles=[make_profile(**PROFILE)])
    await started(world)
    before = world.status
    for name in ("support-bot-1", "support-bot-3"):
        forged(world, name)
    await world.settle()
    assert world.status == before
    # The name of the next attempt is needed; the other is the tenant's own affair.
    assert world.names("Job") == ["support-bot-0", "support-bot-3", "support-bot-prepare"]
    world.fail("support-bot-0", Reason.NODE_LOST)
    await world.settle()
    world.later(60)
    await world.settle()
    assert [(a.number, a.workers, a.gpus, a.profile) for a in world.status.attempts] == [
        (0, 1, 1, "laptop"),
        (1, 1, 1, "laptop"),
    ]


async def test_a_forged_job_in_the_way_is_replaced() -> None:
    world = World(make_job().build())
    uid = forged(world, "support-bot-prepare")["metadata"]["uid"]
    with pytest.raises(NotYet, match="is not what is to be made"):
        await world.reconcile()
    await started(world)
    assert world.state == "Running"
    assert world.status.prepare
    assert world.status.prepare.uid not in (None, uid)


def _annotations(job: Object) -> None:
    job["metadata"]["annotations"] = {
        "finetune.dev/profile": "another",
        "finetune.dev/profile-generation": "9" * 15,
        "finetune.dev/gpus": "1000000",
        "finetune.dev/profile-snapshot": '{"schedulingGraceSeconds":1,"maxActiveDeadlineSeconds":9007199254740992}',
    }


def _no_annotations(job: Object) -> None:
    job["metadata"].pop("annotations", None)


def _labels(job: Object) -> None:
    job["metadata"]["labels"] |= {
        "finetune.dev/attempt": "7",
        "finetune.dev/job-name": "other",
        "kueue.x-k8s.io/queue-name": "fast",
    }


def _no_labels(job: Object) -> None:
    job["metadata"]["labels"] = {}


def _affinity(job: Object) -> None:
    term: Any = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}
    job["spec"]["template"]["spec"]["affinity"] = {"nodeAffinity": term}


@pytest.mark.parametrize("change", [_annotations, _no_annotations, _labels, _no_labels, _affinity])
async def test_what_is_written_on_our_jobs_changes_no_decision(change: Callable[[Object], None]) -> None:
    """Neither a deadline, nor what counts as held, nor the defaults, nor when a gang is given back."""
    ends = []
    for touched in (False, True):
        world = World(make_job().build(), profiles=[make_profile(**PROFILE)])
        await started(world)
        if touched:
            for job in ("support-bot-prepare", "support-bot-0"):
                change(world.objects["Job", job])
        world.profiles = [make_profile()]  # What the attempt was made under holds.
        await world.settle()
        claims = copy.deepcopy(world.line._books)
        world.later(601)
        await world.settle()
        ends.append((claims, world.status.to_json()))
        assert world.status.condition("Failed"), "the deadline holds"
        assert world.status.attempts[0].reason == Reason.DEADLINE_EXCEEDED
    assert ends[0] == ends[1]


async def test_a_gang_that_somebody_scaled_is_stopped() -> None:
    world = await started(World(make_job().build()))
    world.objects["Job", "support-bot-0"]["spec"] |= {"completions": 100, "parallelism": 100}
    await world.settle()
    [attempt] = world.status.attempts
    assert (attempt.outcome, attempt.reason) == ("Retryable", "Preempted")
    assert attempt.message == "Job support-bot-0 was changed: it has 100 workers, and was made with 1"
    assert "support-bot-0" not in world.names("Job")


QUEUE = {"queue": {"name": "team-a"}}


@pytest.mark.parametrize("workloads", [None, [], [{"metadata": {}, "status": {"conditions": []}}]])
async def test_a_gang_that_its_queue_has_not_admitted_is_stopped_and_told(workloads: list[Object] | None) -> None:
    world = World(make_job().with_spec(**QUEUE).build())
    await started(world, attempt_runs=False)
    world.workloads = workloads
    world.objects["Job", "support-bot-0"]["spec"]["suspend"] = False
    world.run("support-bot-0")
    await world.settle()
    world.sweep("support-bot-0")
    [attempt] = world.status.attempts
    assert (attempt.outcome, attempt.reason, world.state) == ("Retryable", "Preempted", "Retrying")
    text = "Job support-bot-0 was resumed, and queue team-a has not admitted it"
    assert (attempt.message or "").startswith(text)
    assert any(text in event["message"] for event in world.events)
    assert "support-bot-0" not in world.names("Job")
    world.later(60)
    await world.settle()
    assert world.objects["Job", "support-bot-1"]["spec"]["suspend"] is True


async def test_who_resumes_each_of_them_comes_to_an_end() -> None:
    world = World(make_job().with_spec(**QUEUE).with_policy(maxAttempts=2).build())
    await started(world, attempt_runs=False)
    for number in range(2):
        world.objects["Job", f"support-bot-{number}"]["spec"]["suspend"] = False
        await world.settle()
        world.later(60)
        await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "MaxAttemptsReached"


class Forbidden(World):
    """Kueue is not ours to read."""

    async def list_workloads(self, namespace: str, job_uid: str) -> list[Object] | None:
        raise ApiError(403, "Forbidden", "workloads is forbidden")


async def test_where_workloads_cannot_be_read_a_gang_goes_on() -> None:
    world = Forbidden(make_job().with_spec(**QUEUE).build())
    await started(world, attempt_runs=False)
    world.objects["Job", "support-bot-0"]["spec"]["suspend"] = False
    world.run("support-bot-0")
    await world.settle()
    assert world.state == "Running"


async def test_what_runs_counts_whoever_started_it() -> None:
    """A gang from a queue takes of what a profile's other jobs may use at a time."""
    profiles = [make_profile(concurrency={"gpusPerNamespace": 1})]
    world = World(make_job().with_spec(**QUEUE).build(), profiles=profiles)
    await started(world, attempt_runs=False)
    other = make_job("other").with_meta(uid="other-uid").with_spec(profile="laptop").build()
    second = World(other, profiles=profiles, line=world.line)
    await started(second, attempt_runs=False)
    assert second.state == "Starting"
    world.admit("support-bot-0")
    world.run("support-bot-0")
    await world.settle()
    third = make_job("third").with_meta(uid="third-uid").build()
    waits = World(third, profiles=profiles, line=world.line)
    await started(waits, attempt_runs=False)
    assert waits.state == "Queued"
    second.complete("other-0")
    await second.settle()
    await waits.settle()
    assert waits.state == "Queued"
    world.complete("support-bot-0")
    await world.settle()
    await waits.settle()
    assert waits.state == "Starting"


async def test_a_record_comes_before_what_it_tells_of() -> None:
    """A refused create leaves the record, which is neither an attempt that ended nor one that runs."""

    class Refusing(World):
        refused = True

        async def create(self, manifest: Object) -> Object:
            if self.refused and manifest["kind"] == "Job" and manifest["metadata"]["name"].endswith("-0"):
                raise ApiError(403, "Forbidden", "exceeded quota")
            return await super().create(manifest)

    world = Refusing(make_job().build())
    await world.settle()
    world.prepared()
    for _ in range(3):
        with pytest.raises(ApiError):
            await world.reconcile()
        [attempt] = world.status.attempts
        assert (attempt.number, attempt.uid, attempt.outcome, attempt.gpus) == (0, None, None, 1)
        world.later(5)
    asked = attempt.creation_time
    assert world.state == "Preparing"
    world.refused = False
    await world.settle()
    [attempt] = world.status.attempts
    assert (attempt.uid, attempt.creation_time) == (world.objects["Job", "support-bot-0"]["metadata"]["uid"], asked)
    assert [e["reason"] for e in world.events].count("AttemptStarted") == 1


async def test_prepare_has_a_deadline_of_its_own() -> None:
    world = World(make_job().build(), profiles=[make_profile(prepare={"activeDeadlineSeconds": 100})])
    await world.settle()
    world.later(50)
    world.run("support-bot-prepare")
    assert await world.settle() == 100
    world.later(100)
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "DeadlineExceeded"
    assert failed.message == (
        "support-bot-prepare ran longer than 100 s, which is all that profile 'laptop' gives it "
        "(spec.prepare.activeDeadlineSeconds)"
    )
    assert world.names("Job") == []


@pytest.mark.parametrize(("own", "jobs", "ends"), [(60, None, 60), (60, 600, 60), (600, 60, 60)])
async def test_prepare_does_not_wait_for_ever_to_run(own: int, jobs: int | None, ends: int) -> None:
    policy = {"preRunningDeadlineSeconds": jobs} if jobs else {}
    profile = make_profile(prepare={"preRunningDeadlineSeconds": own})
    world = World(make_job().with_policy(**policy).build(), profiles=[profile])
    await world.settle()
    world.place("support-bot-prepare", 0)
    world.later(ends)
    await world.settle()
    failed = world.status.condition("Failed")
    assert failed
    assert failed.reason == "PreRunningDeadlineExceeded"
    assert f"did not run within {ends} preRunningDeadlineSeconds" in failed.message
