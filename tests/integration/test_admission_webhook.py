"""The webhook's server by itself: AdmissionReviews over TLS, its look-ups answered by an API server's own RBAC."""

import json
import secrets
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from kubernetes.aio.client.configuration import Configuration
from prometheus_client import generate_latest

from finetune_operator.admission import MAX_BODY
from finetune_operator.cluster import KubeCluster
from finetune_operator.metrics import Metrics
from support.admitting import PATH, webhook_server
from support.api import Api
from support.manifests import job_manifest
from support.reporting import install_crds, kube_cluster
from support.world import make_profile

pytestmark = pytest.mark.integration
RBAC = "/apis/rbac.authorization.k8s.io/v1"


@dataclass(frozen=True)
class Webhook:
    session: aiohttp.ClientSession
    url: str
    metrics: Metrics

    async def post(self, data: bytes, path: str = PATH, method: str = "POST") -> tuple[int, str]:
        async with self.session.request(method, self.url + path, data=data) as response:
            return response.status, await response.text()

    async def review(self, job: dict[str, Any], user: str, *groups: str) -> dict[str, Any]:
        """The response to the creation of a job by this user."""
        request = {
            "uid": "u",
            "kind": {"kind": job["kind"]},
            "operation": "CREATE",
            "namespace": job["metadata"].get("namespace"),
            "name": job["metadata"]["name"],
            "userInfo": {"username": user, "groups": [*groups, "system:authenticated"], "extra": {"a/b": ["c"]}},
            "object": job,
        }
        status, text = await self.post(json.dumps({"apiVersion": "admission.k8s.io/v1", "request": request}).encode())
        assert status == 200, text
        response: dict[str, Any] = json.loads(text)["response"]
        return response


@asynccontextmanager
async def serve(cluster: KubeCluster, folder: Path) -> AsyncIterator[Webhook]:
    async with webhook_server(cluster, folder) as (server, metrics):
        trust = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session:
            yield Webhook(session, f"https://127.0.0.1:{server.port}", metrics)


@pytest.fixture
async def webhook(cluster: Any, api: Api, tmp_path: Path) -> AsyncIterator[Webhook]:
    await install_crds(api)
    async with kube_cluster(cluster.kubeconfig) as kube, serve(kube, tmp_path / "tls") as served:
        yield served


@pytest.fixture
async def profile(api: Api, webhook: Webhook) -> AsyncIterator[str]:
    made = make_profile(f"p-{secrets.token_hex(4)}", default=False)
    del made["metadata"]["resourceVersion"]
    made["spec"] |= {"limits": {"maxWorkers": 2}, "serviceAccounts": ["tuner", "other"]}
    path = "/apis/finetune.dev/v1alpha1/finetuneprofiles"
    (await api.create(path, made)).must(201)
    yield made["metadata"]["name"]
    await api.delete(f"{path}/{made['metadata']['name']}")


async def grant(api: Api, namespace: str, user: str, resource: str, name: str, verb: str) -> None:
    role = f"r-{secrets.token_hex(4)}"
    rules = [{"apiGroups": [""], "resources": [resource], "resourceNames": [name], "verbs": [verb]}]
    base = f"{RBAC}/namespaces/{namespace}"
    (await api.create(f"{base}/roles", {"metadata": {"name": role}, "rules": rules})).must(201)
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": role}
    subjects = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]
    binding = {"metadata": {"name": role}, "roleRef": ref, "subjects": subjects}
    (await api.create(f"{base}/rolebindings", binding)).must(201)


async def test_an_author_may_name_only_a_secret_of_their_own(
    api: Api, namespace: str, webhook: Webhook, profile: str
) -> None:
    for number, verb in enumerate(("get", "use")):
        user = f"user-{number}-{namespace}"
        await grant(api, namespace, user, "secrets", "mine", verb)

        def job(secret: str) -> dict[str, Any]:
            return job_manifest("j", namespace, profile=profile, credentials={"secretRef": {"name": secret}})

        assert (await webhook.review(job("mine"), user))["allowed"] is True
        refused = await webhook.review(job("theirs"), user)
        assert refused["allowed"] is False
        assert refused["status"]["code"] == 403
        assert "spec.credentials.secretRef.name: found 'theirs'" in refused["status"]["message"]
        assert f"'{user}' may name only secrets in '{namespace}'" in refused["status"]["message"]


async def test_an_author_may_name_only_a_service_account_that_they_may_be(
    api: Api, namespace: str, webhook: Webhook, profile: str
) -> None:
    user = f"user-{namespace}"
    await grant(api, namespace, user, "serviceaccounts", "tuner", "impersonate")

    def job(account: str) -> dict[str, Any]:
        return job_manifest("j", namespace, profile=profile, credentials={"serviceAccountName": account})

    assert (await webhook.review(job("tuner"), user))["allowed"] is True
    message = (await webhook.review(job("other"), user))["status"]["message"]
    assert "spec.credentials.serviceAccountName: found 'other'" in message
    assert (await webhook.review(job("other"), "root", "system:masters"))["allowed"] is True


async def test_rights_in_another_namespace_are_none_here(
    api: Api, namespace: str, webhook: Webhook, profile: str
) -> None:
    other = f"{namespace}-b"
    (await api.create("/api/v1/namespaces", {"metadata": {"name": other}})).must(201)
    user = f"user-{namespace}"
    await grant(api, other, user, "secrets", "keys", "get")
    job = job_manifest("j", namespace, profile=profile, credentials={"secretRef": {"name": "keys"}})
    assert (await webhook.review(job, user))["allowed"] is False
    await api.delete(f"/api/v1/namespaces/{other}")


async def test_the_profile_is_looked_up(namespace: str, webhook: Webhook, profile: str) -> None:
    job = job_manifest("j", namespace, profile=profile, distribution={"workers": 4})
    refused = await webhook.review(job, "somebody")
    assert "spec.distribution.workers: found 4" in refused["status"]["message"]
    assert "allows at most 2" in refused["status"]["message"]
    job["spec"]["profile"] = "none"
    answer = await webhook.review(job, "somebody")
    assert answer["allowed"] is True
    assert "'none' does not exist" in answer["warnings"][0]


async def test_what_is_no_review_is_refused(webhook: Webhook) -> None:
    assert (await webhook.post(b"{}"))[0] == 400
    assert (await webhook.post(b"\xff\xfe"))[0] == 400
    assert (await webhook.post(b"[" * 200_000))[0] == 400
    assert (await webhook.post(b"", method="GET"))[0] == 405
    assert (await webhook.post(b" " * (MAX_BODY + 1)))[0] == 413


async def test_an_api_server_that_does_not_answer_admits_nothing(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        kube = KubeCluster(Configuration(host=f"http://127.0.0.1:{closed.getsockname()[1]}"))
        async with serve(kube, tmp_path / "tls") as webhook:
            job = job_manifest("j", "default")
            request = {"kind": {"kind": "FineTuneJob"}, "operation": "CREATE", "namespace": "default"}
            request |= {"object": job, "userInfo": {"username": "a"}}
            body = json.dumps({"apiVersion": "admission.k8s.io/v1", "request": request}).encode()
            assert (await webhook.post(body))[0] == 503
            assert b'admission_reviews_total{result="failed"} 1.0' in generate_latest(webhook.metrics.registry)
        await kube.close()
