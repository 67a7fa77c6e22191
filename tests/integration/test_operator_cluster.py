"""The operator's client against an API server: what its promises rest on must be so on every server."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.kube_config import load_kube_config

from finetune_api.profile import FineTuneProfileSpec
from finetune_operator import cluster as client
from finetune_operator.accept import Subject
from finetune_operator.cluster import ApiError, KubeCluster
from finetune_operator.network import policy
from finetune_operator.reconcile import event, utc_now
from finetune_operator.status import Note
from support.api import Api, Object
from support.manifests import job_manifest
from support.reporting import install_crds

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = pytest.mark.integration


@pytest.fixture
async def kube(cluster: "Sandbox") -> AsyncIterator[KubeCluster]:
    configuration = Configuration()
    await load_kube_config(str(cluster.kubeconfig), client_configuration=configuration, persist_config=False)
    kube = KubeCluster(configuration)
    yield kube
    await kube.close()


@pytest.fixture
async def job(api: Api, namespace: str) -> Object:
    await install_crds(api)
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
    created: Object = (await api.create(path, job_manifest("j", namespace))).must(201)
    return created


def config_map(namespace: str, name: str) -> Object:
    meta = {"name": name, "namespace": namespace, "labels": {"finetune.dev/job-name": "j"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {}}


async def test_what_exists_is_not_created_again(kube: KubeCluster, namespace: str) -> None:
    await kube.create(config_map(namespace, "a"))
    with pytest.raises(ApiError) as caught:
        await kube.create(config_map(namespace, "a"))
    assert caught.value.reason == "AlreadyExists"
    assert await kube.get("ConfigMap", namespace, "nobody") is None


async def test_a_network_policy_is_kept_as_it_was_written(kube: KubeCluster, namespace: str) -> None:
    """Otherwise one that is found there would always be out of date."""
    egress = [
        {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"], "ports": [443]},
        {"podNamespace": "proxy", "podLabels": {"app": "squid"}},
        {"cidr": "fd00::/8", "ports": [53], "protocol": "UDP"},
    ]
    profiles: list[Object] = [{}, {"egress": egress}, {"storage": {"endpoint": "http://minio.storage.svc:9000"}}]
    for number, spec in enumerate(profiles):
        profile = FineTuneProfileSpec.model_validate({"image": "i@sha256:0", "networkPolicy": True, **spec})
        labels = {"finetune.dev/job-name": "j", "finetune.dev/attempt": "0"}
        meta = {"name": f"p-{number}", "namespace": namespace}
        manifest = policy(meta, labels, profile, "https://ft-progress.finetune-system.svc:8443")
        await kube.create(manifest)
        found = await kube.get("NetworkPolicy", namespace, f"p-{number}")
        assert found
        assert found["spec"] == manifest["spec"]


async def test_only_the_very_object_is_deleted(kube: KubeCluster, namespace: str) -> None:
    made = await kube.create(config_map(namespace, "a"))
    assert not await kube.delete("ConfigMap", namespace, "a", "00000000-0000-0000-0000-000000000000")
    uid = made["metadata"]["uid"]
    assert not await kube.delete("ConfigMap", namespace, "a", uid, "1")
    assert await kube.get("ConfigMap", namespace, "a")
    assert await kube.delete("ConfigMap", namespace, "a", uid)
    assert not await kube.delete("ConfigMap", namespace, "a", uid)


async def test_a_status_that_changed_since_it_was_read_is_not_touched(kube: KubeCluster, job: Object) -> None:
    namespace, uid = job["metadata"]["namespace"], job["metadata"]["uid"]
    read = job["metadata"]["resourceVersion"]
    assert await kube.patch_status(namespace, "j", uid, {"message": "yes"}, read)
    assert not await kube.patch_status(namespace, "j", uid, {"message": "no"}, read)
    assert await kube.patch_trainer_status(namespace, "j", uid, {"progressPercentage": 7})
    found = await kube.get_job(namespace, "j")
    assert found
    assert found["status"] == {"message": "yes", "trainerStatus": {"progressPercentage": 7}}
    assert not await kube.patch_status(namespace, "nobody", uid, {"message": "no"})


async def test_lists_are_whole_though_they_come_in_pages(
    kube: KubeCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PAGE", 2)
    for name in "abcde":
        await kube.create(config_map(namespace, name))
    other = config_map(namespace, "other")
    other["metadata"]["labels"] = {"finetune.dev/job-name": "another"}
    await kube.create(other)
    found = await kube.list_children("ConfigMap", namespace, "j")
    assert [item["metadata"]["name"] for item in found] == list("abcde")


async def test_an_event_that_comes_again_is_counted(kube: KubeCluster, api: Api, job: Object) -> None:
    subject = Subject.read(job)
    told = event(
        subject.namespace, subject.name, subject.uid, Note("Warning", "Hung", "attempt 0: no step in 300 s"), utc_now()
    )
    for _ in range(3):
        await kube.post_event(told)
    [found] = await api.items(f"/api/v1/namespaces/{subject.namespace}/events", fieldSelector="reason=Hung")
    assert (found["count"], found["involvedObject"]["uid"], found["type"]) == (3, subject.uid, "Warning")
