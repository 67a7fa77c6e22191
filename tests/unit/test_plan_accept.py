"""What is refused, with which reason, and whether that is for ever."""

from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_operator.accept import Refusal, Subject, check, select_profile
from support.world import JobBuilder, World, make_job, make_profile


def refusal(job: JobBuilder) -> Refusal:
    found = Subject.read(job.build()).job
    assert isinstance(found, Refusal)
    return found


@pytest.mark.parametrize(
    ("job", "field"),
    [
        (make_job().with_spec(distribution={"workers": -1}), "spec.distribution.workers: found -1"),
        (make_job().with_spec(colour="red"), "spec.colour: this field does not exist"),
        (make_job().with_spec(output={"uri": "gs://x"}), "spec.output.uri"),
        (make_job().with_spec(method={"type": "PPO"}), "spec.method.ppo.rewardModel: found none; PPO learns from"),
        (make_job("j" * 51), "metadata.name"),
        (make_job().with_spec(queue={"name": "q" * 64}), "string should have at most 63 characters"),
    ],
)
async def test_an_invalid_spec_fails_with_its_field_and_no_pod(job: JobBuilder, field: str) -> None:
    world = World(job.build())
    await world.settle()
    assert world.state == "Failed"
    assert world.created == []
    assert field in (world.status.message or "")
    failed = world.status.condition("Failed")
    assert failed
    assert (failed.status, failed.reason) == ("True", "InvalidSpec")
    assert world.writes == 1
    assert [e["reason"] for e in world.events] == ["InvalidSpec"]


def test_every_problem_is_named_up_to_five() -> None:
    found = refusal(make_job().with_spec(a=1, b=2, c=3, d=4, e=5, f=6))
    assert found.message.count("does not exist") == 5
    assert found.message.endswith("(and 1 more)")


async def test_a_job_waits_for_its_profile_and_starts_when_it_appears() -> None:
    world = World(make_job().with_spec(profile="a100").build(), profiles=[])
    after = await world.settle()
    accepted = world.status.condition("Accepted")
    assert accepted
    assert (world.state, accepted.status, accepted.reason) == ("Pending", "False", "ProfileNotFound")
    assert after == 20
    world.profiles = [make_profile("a100", default=False)]
    await world.settle()
    assert world.state == "Preparing"
    accepted = world.status.condition("Accepted")
    assert accepted
    assert accepted.status == "True"


async def test_a_profile_that_cannot_be_meant_is_not_used() -> None:
    world = World(make_job().build(), profiles=[make_profile(locked=["training.maxLenght"])])
    await world.settle()
    assert world.state == "Pending"
    assert "spec.locked[0]: found 'training.maxLenght'" in (world.status.message or "")


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        ([make_profile("b"), make_profile("a"), make_profile("c", default=False)], "a"),
        ([make_profile("c", default=False)], None),
        ([], None),
    ],
)
def test_the_default_profile(profiles: list[Any], expected: str | None) -> None:
    found = select_profile(None, profiles)
    if expected is None:
        assert isinstance(found, Refusal)
        assert found.reason is Reason.PROFILE_NOT_FOUND
    else:
        assert not isinstance(found, Refusal)
        assert found.metadata.name == expected


@pytest.mark.parametrize(
    ("job", "profile", "message"),
    [
        ({}, {"allowedNamespaces": ["team-b"]}, "metadata.namespace: found 'team-a'"),
        ({"distribution": {"workers": 4}}, {"limits": {"maxWorkers": 2}}, "spec.distribution.workers: found 4"),
        ({"distribution": {"gpusPerWorker": 16}}, {"limits": {"maxGPUs": 8}}, "spec.distribution: found 16"),
        (
            {"runPolicy": {"activeDeadlineSeconds": 9}},
            {"limits": {"maxActiveDeadlineSeconds": 8}},
            "spec.runPolicy.activeDeadlineSeconds: found 9",
        ),
        (
            {"credentials": {"serviceAccountName": "admin"}},
            {"serviceAccounts": ["tuner"]},
            "spec.credentials.serviceAccountName: found 'admin'; profile 'laptop' allows tuner",
        ),
        (
            {"baseModel": {"uri": "s3://models/tiny/", "dtype": "Float16"}},
            {},
            "spec.baseModel.dtype: found Float16; profile 'laptop' has no accelerators",
        ),
        ({"credentials": {"serviceAccountName": "tuner"}}, {"serviceAccounts": ["tuner"]}, None),
        ({}, {"allowedNamespaces": ["team-a"], "limits": {"maxWorkers": 1, "maxGPUs": 1}}, None),
    ],
)
def test_limits_of_the_profile(job: Any, profile: Any, message: str | None) -> None:
    read = Subject.read(make_job().with_spec(**job).build()).job
    chosen = select_profile(None, [make_profile(**profile)])
    assert not isinstance(read, Refusal)
    assert not isinstance(chosen, Refusal)
    found = check(read, chosen)
    if message is None:
        assert found is None
    else:
        assert found
        assert found.reason is Reason.NOT_ALLOWED_BY_PROFILE
        assert message in found.message


async def test_what_the_profile_forbids_is_final() -> None:
    world = World(make_job().with_spec(distribution={"workers": 4}).build())
    world.profiles = [make_profile(limits={"maxWorkers": 2})]
    await world.settle()
    assert (world.state, world.created) == ("Failed", [])
    world.profiles = [make_profile()]
    await world.settle()
    assert (world.state, world.created) == ("Failed", [])


@pytest.mark.parametrize(
    "job",
    [
        make_job().with_policy(managedBy="kueue.x-k8s.io/multikueue"),
        make_job().with_meta(deletionTimestamp="2026-03-01T12:00:00Z"),
    ],
)
async def test_hands_off(job: JobBuilder) -> None:
    world = World(job.build())
    assert await world.reconcile() is None
    assert world.writes == 0
    assert world.events == []
