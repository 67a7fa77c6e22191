"""The NetworkPolicy of an attempt: what it lets through, and how long it is there."""

from typing import Any

import kubernetes_validate
import pydantic
import pytest

from finetune_api.failures import Reason
from finetune_api.job import parse
from finetune_api.model import format_path, problems_of
from finetune_api.profile import FineTuneProfile, FineTuneProfileSpec
from finetune_operator import manifests
from finetune_operator.fitting import sized
from finetune_operator.manifests import Context
from finetune_operator.reconcile import NotYet
from support.traffic import End, allows
from support.world import PREPARED, Crash, Object, World, make_job, make_profile, started

CONTEXT = Context("https://ft-progress.finetune-system.svc:8443", "", "0.1.0")
OPERATOR = {"app.kubernetes.io/name": "finetune-operator"}
METADATA = End(address="169.254.169.254")


def policies(**profile: Any) -> tuple[Object, Object]:
    """Of `prepare`, and of attempt 3."""
    job = parse(make_job().build())
    chosen = FineTuneProfile.model_validate(make_profile(networkPolicy=True, **profile))
    gang = manifests.gang(job, chosen, CONTEXT, 3, PREPARED, sized(job, chosen, PREPARED))
    found = [o for objects in (manifests.prepare(job, chosen, CONTEXT), gang) for o in objects]
    prepare, train = (o for o in found if o["kind"] == "NetworkPolicy")
    kubernetes_validate.validate(train, "1.37", strict=True)
    return prepare, train


def labels(attempt: str, job: str = "support-bot") -> Object:
    return {"finetune.dev/job-name": job, "finetune.dev/attempt": attempt}


def out(policy: Object, other: End, port: int, protocol: str = "TCP") -> bool:
    return allows(policy, "egress", "team-a", other, port, protocol)


def test_ranks_reach_each_other_and_nobody_else_reaches_them() -> None:
    _, policy = policies()
    assert policy["spec"]["podSelector"] == {"matchLabels": labels("3")}
    for direction in ("ingress", "egress"):
        assert allows(policy, direction, "team-a", End("team-a", labels("3")), 41234)
        for stranger in (
            End("team-a", labels("2")),
            End("team-a", labels("3", "another")),
            End("team-b", labels("3")),
            End("team-a"),
            End("kube-system", {"k8s-app": "kube-dns"}),
        ):
            assert not allows(policy, direction, "team-a", stranger, 41234), (direction, stranger)
    assert not allows(policy, "ingress", "team-a", End(address="10.1.2.3"), 29500)


def test_dns_and_the_progress_server_are_reached_and_not_what_stands_beside_them() -> None:
    for policy in policies():
        for protocol in ("UDP", "TCP"):
            assert out(policy, End("kube-system", {"k8s-app": "kube-dns"}), 53, protocol)
        assert not out(policy, End("kube-system", {"k8s-app": "metrics-server"}), 53)
        assert not out(policy, End("team-b", {"k8s-app": "kube-dns"}), 53, "UDP")
        assert out(policy, End("finetune-system", OPERATOR), 8443)
        assert not out(policy, End("finetune-system", OPERATOR), 9090), "its metrics are not for tenants"
        assert not out(policy, End("finetune-system", {"app": "grafana"}), 8443)
        assert not out(policy, End("team-b", OPERATOR), 8443)


@pytest.mark.parametrize(
    ("storage", "reached", "refused"),
    [
        ({}, (End(address="52.1.2.3"), 443), (End(address="52.1.2.3"), 22)),
        ({}, (End(address="2600:1::1"), 443), (End(address="fd00:ec2::254"), 443)),
        ({"endpoint": "http://store.example:9000"}, (End(address="10.9.9.9"), 9000), (METADATA, 9000)),
        ({"endpoint": "https://10.0.0.5"}, (End(address="10.0.0.5"), 443), (End(address="10.0.0.6"), 443)),
        ({"endpoint": "http://[fd12::5]:9000"}, (End(address="fd12::5"), 9000), (End(address="fd12::6"), 9000)),
        (
            {"endpoint": "http://minio.storage.svc.cluster.local:80"},
            (End("storage", {"app": "minio"}), 9000),
            (End("team-b", {"app": "minio"}), 9000),
        ),
    ],
)
def test_the_object_store_is_where_its_endpoint_says(storage: Object, reached: Any, refused: Any) -> None:
    for policy in policies(storage=storage):
        assert out(policy, *reached)
        assert not out(policy, *refused)
        assert not out(policy, METADATA, 80)
        assert not out(policy, METADATA, 443)


def test_a_profiles_list_is_instead_of_the_endpoints_place() -> None:
    egress = [
        {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"], "ports": [443]},
        {"podNamespace": "proxy", "podLabels": {"app": "squid"}, "ports": [3128]},
        {"cidr": "169.254.20.10/32", "ports": [53], "protocol": "UDP"},
    ]
    _, policy = policies(egress=egress, storage={"endpoint": "https://52.1.2.3"})
    assert out(policy, End(address="10.2.3.4"), 443)
    assert not out(policy, End(address="10.1.3.4"), 443)
    assert not out(policy, End(address="52.1.2.3"), 443)
    assert out(policy, End("proxy", {"app": "squid"}), 3128)
    assert not out(policy, End("proxy", {"app": "other"}), 3128)
    assert out(policy, End(address="169.254.20.10"), 53, "UDP")
    assert not out(policy, End(address="169.254.20.10"), 53, "TCP")


@pytest.mark.parametrize(
    ("egress", "path", "words"),
    [
        ([{"cidr": "999.0.0.0/8"}], "spec.egress[0].cidr", "it must be a network"),
        ([{"cidr": "10.0.0.1/8"}], "spec.egress[0].cidr", "it must be a network"),
        ([{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}], "spec.egress[0]", "must be a smaller part of cidr"),
        ([{"cidr": "10.0.0.0/8", "except": ["::/16"]}], "spec.egress[0]", "must be a smaller part of cidr"),
        ([{"cidr": "10.0.0.0/8", "podNamespace": "a"}], "spec.egress[0]", "exactly one of cidr and podNamespace"),
        ([{"podNamespace": "a", "except": ["10.0.0.0/8"]}], "spec.egress[0]", "only beside cidr"),
        ([{"cidr": "10.0.0.0/8", "podLabels": {"a": "b"}}], "spec.egress[0]", "only beside podNamespace"),
    ],
)
def test_a_place_that_means_nothing_is_refused(egress: Any, path: str, words: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        FineTuneProfileSpec.model_validate({"image": "i@sha256:0", "networkPolicy": True, "egress": egress})
    [problem] = problems_of(caught.value, ("spec",))
    assert format_path(problem.path) == path
    assert words in problem.message


def test_a_list_without_a_policy_must_not_be_believed() -> None:
    with pytest.raises(pydantic.ValidationError, match="egress is allowed only where networkPolicy is true"):
        FineTuneProfileSpec.model_validate({"image": "i@sha256:0", "egress": [{"cidr": "10.0.0.0/8"}]})


def world() -> World:
    return World(make_job().build(), profiles=[make_profile(networkPolicy=True)])


async def test_it_is_there_before_the_pods() -> None:
    played = await started(world())
    for job in ("support-bot-prepare", "support-bot-0"):
        assert played.created.index(f"NetworkPolicy/{job}") < played.created.index(f"Job/{job}")


async def test_without_one_in_the_profile_there_is_none() -> None:
    played = await started(World(make_job().build()))
    assert played.names("NetworkPolicy") == []


async def test_pods_that_are_told_to_end_stay_behind_it_until_the_next_ones_come() -> None:
    played = await started(world())
    played.set_policy(suspend=True)
    await played.settle()
    assert played.state == "Suspended"
    assert "Job/support-bot-0" in played.deleted
    assert "support-bot-0" in played.names("NetworkPolicy"), "its pods still save what they have"
    played.sweep("support-bot-0")
    played.set_policy(suspend=False)
    await played.settle()
    assert played.names("NetworkPolicy") == ["support-bot-1", "support-bot-prepare"]


async def test_those_of_old_attempts_go_with_their_jobs() -> None:
    played = await started(world())
    played.set_policy(maxAttempts=9)
    for number in range(5):
        played.fail(f"support-bot-{number}", Reason.RANK_FAILED)
        await played.settle()
        played.later(3600)
        await played.settle()
        played.run(f"support-bot-{number + 1}")
        await played.settle()
    assert played.names("NetworkPolicy") == [*(f"support-bot-{n}" for n in (2, 3, 4, 5)), "support-bot-prepare"]
    assert {f"Job/{name}" for name in played.names("NetworkPolicy")} == {f"Job/{n}" for n in played.names("Job")}


async def test_one_that_was_made_under_another_profile_is_made_anew() -> None:
    played = world()
    played.crash_after = 2
    with pytest.raises(Crash):
        await played.reconcile()
    before = played.objects["NetworkPolicy", "support-bot-prepare"]["metadata"]["uid"]
    played.profiles = [make_profile(networkPolicy=True, storage={"endpoint": "https://10.0.0.5"})]
    with pytest.raises(NotYet, match="is not what is to be made"):
        await played.reconcile()
    await played.settle()
    found = played.objects["NetworkPolicy", "support-bot-prepare"]
    assert found["metadata"]["uid"] != before
    assert out(found, End(address="10.0.0.5"), 443)
