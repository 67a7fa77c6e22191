"""The test of a cluster's NetworkPolicies: its objects, its pods as processes, and what is concluded when."""

import copy
import datetime
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from finetune_api.nettest import Reach
from finetune_api.profile import FineTuneProfile
from finetune_operator import nettest
from finetune_operator.cluster import ApiError
from finetune_operator.nettesting import NetworkTests
from support.s3 import unused_port
from support.traffic import End, allows
from support.world import START, Object, make_profile, merge

NAME = nettest.name_of("laptop")
SECOND = datetime.timedelta(seconds=1)


def profile(**status: Any) -> FineTuneProfile:
    raw = make_profile(networkPolicy=True)
    return FineTuneProfile.model_validate(raw | ({"status": {"network": status}} if status else {}))


def test_its_objects_are_valid_and_restricted() -> None:
    service, policy, job = nettest.objects(profile(), "finetune-system")
    for manifest in (service, policy, job):
        kubernetes_validate.validate(manifest, "1.37", strict=True)
        assert manifest["metadata"]["name"] == NAME
    pod = job["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    assert chosen == {nettest.LABEL: NAME, "batch.kubernetes.io/job-completion-index": "1"}
    listener = End("finetune-system", labels)
    assert not allows(policy, "egress", "finetune-system", listener, 29500)
    assert allows(policy, "egress", "finetune-system", End("kube-system", {"k8s-app": "kube-dns"}), 53, "UDP")
    assert len(nettest.name_of("p" * 253)) <= 63


def reach(start: float, end: float, reached: float | None = None) -> Reach:
    at = None if reached is None else START + reached * SECOND
    return Reach(started=START + start * SECOND, ended=START + end * SECOND, reached=at)


def pods(denied: Reach | None, free: Reach | None) -> list[Object]:
    def pod(index: int, text: str) -> Object:
        ended = {"terminated": {"exitCode": 0, "message": text}}
        return {
            "metadata": {"annotations": {"batch.kubernetes.io/job-completion-index": str(index)}},
            "status": {"containerStatuses": [{"name": "trainer", "state": ended}]},
        }

    said = [(1, denied), (2, free)]
    found = [pod(index, told.model_dump_json(by_alias=True)) for index, told in said if told]
    return [pod(0, ""), {"metadata": {}}, *found]


@pytest.mark.parametrize(
    ("denied", "free", "enforced", "words"),
    [
        (reach(0, 60), reach(5, 65, 7), "True", "reached nothing that it does not allow"),
        (reach(0, 60, 3), reach(5, 65, 7), "False", "enforces none"),
        (reach(0, 60, 3), None, "False", "enforces none"),
        (reach(0, 60), reach(5, 65), "Unknown", "reached nothing either"),
        (reach(0, 60), None, "Unknown", "did not all run"),
        (None, reach(5, 65, 7), "Unknown", "did not all run"),
        (reach(0, 60), reach(300, 360, 301), "Unknown", "did not try at the same time"),
    ],
)
def test_what_pods_say_decides(denied: Any, free: Any, enforced: str, words: str) -> None:
    status = nettest.verdict(pods(denied, free), 4, START)
    assert (status.enforced, status.generation, status.tested_time) == (enforced, 4, START)
    assert words in status.message


def test_a_pod_that_says_something_else_says_nothing() -> None:
    found = pods(reach(0, 60), reach(0, 60, 1))
    found[-1]["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = "Killed"
    assert nettest.verdict(found, 1, START).enforced == "Unknown"


@pytest.mark.parametrize(
    ("status", "later", "due"),
    [
        ({}, 0, True),
        ({"enforced": "True", "testedTime": START, "generation": 1}, 3600, False),
        ({"enforced": "True", "testedTime": START, "generation": 1}, 86_400, True),
        ({"enforced": "Unknown", "testedTime": START, "generation": 1}, 3600, True),
        ({"enforced": "True", "testedTime": START, "generation": 0}, 1, True),
        ({"enforced": "Unknown"}, 0, True),
    ],
)
def test_it_is_repeated(status: dict[str, Any], later: int, due: bool) -> None:
    assert nettest.due(profile(**status), START + later * SECOND) is due


class Cluster:
    """Keeps what was written."""

    def __init__(self) -> None:
        self.profile = make_profile(networkPolicy=True)
        self.objects: dict[tuple[str, str], Object] = {}
        self.pods: list[Object] = []

    async def list_profiles(self) -> list[Object]:
        return [self.profile]

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return self.objects.get((kind, name))

    async def create(self, manifest: Object) -> Object:
        key = manifest["kind"], manifest["metadata"]["name"]
        if key in self.objects:
            raise ApiError(409, "AlreadyExists", key[1])
        self.objects[key] = copy.deepcopy(manifest)
        self.objects[key]["metadata"]["uid"] = f"uid-{key[0]}"
        return self.objects[key]

    async def delete(self, kind: str, namespace: str, name: str, uid: str, resource_version: str | None = None) -> bool:
        return self.objects.pop((kind, name))["metadata"]["uid"] == uid

    async def list_labelled(self, kind: str, namespace: str, label: str) -> list[Object]:
        assert (kind, label) == ("Pod", f"{nettest.LABEL}={NAME}")
        return self.pods

    async def patch_profile_status(self, name: str, patch: Object) -> bool:
        self.profile["status"] = merge(self.profile.get("status", {}), patch)
        return True

    @property
    def network(self) -> Object:
        found: Object = self.profile["status"]["network"]
        return found


async def test_from_the_profile_to_its_status() -> None:
    cluster = Cluster()
    tests = NetworkTests(cluster, "finetune-system")
    # What an earlier try left behind is in nobody's way.
    await cluster.create(nettest.objects(profile(), "finetune-system")[0])
    for _ in range(2):
        await tests.step(cluster.profile, START)
        assert [kind for kind, _ in cluster.objects] == ["Service", "NetworkPolicy", "Job"]
        assert cluster.network["enforced"] == "Unknown"
    cluster.objects["Job", NAME]["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    cluster.pods = pods(reach(0, 60), reach(5, 65, 7))
    await tests.step(cluster.profile, START)
    assert cluster.network["enforced"] == "True"
    assert cluster.objects == {}
    await tests.step(cluster.profile, START + SECOND)
    assert cluster.objects == {}, "once a day is enough"
    await tests.step(cluster.profile, START + nettest.AGAIN)
    assert ("Job", NAME) in cluster.objects
    assert cluster.network.keys() == {"enforced", "message"}, "what was known before is not known any more"


async def test_a_profile_without_policies_is_not_tested() -> None:
    cluster = Cluster()
    cluster.profile = make_profile()
    await NetworkTests(cluster, "finetune-system").step(cluster.profile, START)
    assert cluster.objects == {}


def pod(index: int, port: int, directory: Path, host: str = "127.0.0.1") -> subprocess.Popen[bytes]:
    """The program of one pod."""
    env = os.environ | {
        "FINETUNE_WORKER_INDEX": str(index),
        "FINETUNE_MASTER_PORT": str(port),
        "FINETUNE_MASTER_ADDR": host,
        "FINETUNE_POD_IP": "127.0.0.1",
        "FINETUNE_NETTEST_SECONDS": "3",
        "FINETUNE_TERMINATION_LOG": str(directory / str(index)),
    }
    return subprocess.Popen([sys.executable, "-m", "finetune_trainer", "nettest"], env=env)


def test_its_pods_tell_what_they_reached(tmp_path: Path) -> None:
    port = unused_port()
    # Nobody listens at this address: a connection is refused as a policy may do it.
    running = [pod(0, port, tmp_path), pod(1, port, tmp_path, "127.0.0.77"), pod(2, port, tmp_path)]
    assert [process.wait(30) for process in running] == [0, 0, 0]
    denied, free = (Reach.read((tmp_path / index).read_text()) for index in "12")
    assert denied
    assert denied.reached is None
    assert denied.ended - denied.started >= 3 * SECOND
    assert free
    assert free.reached
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the listener ends by itself"
