"""Two tenants on one API server: what one of them may do with the other's objects, pods, logs and progress. Nothing."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from finetune_api.progress import audience
from support import rights
from support.api import Answer, Api, Object
from support.manifests import job_manifest
from support.reporting import STATUS, Attempt, Reporting, install_crds, kube_cluster, progress_server

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
OWN = [
    {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["*"]},
    {"apiGroups": [""], "resources": ["secrets", "configmaps", "serviceaccounts", "pods"], "verbs": ["*"]},
    {"apiGroups": [""], "resources": ["pods/log", "events", "services"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["get", "list", "watch"]},
]
"""More than a tenant needs: of their own namespace they may do nearly everything."""
NAMES = {
    "secrets": ("/api/v1", "s3"),
    "serviceaccounts": ("/api/v1", "tuner"),
    "configmaps": ("/api/v1", "run"),
    "pods": ("/api/v1", "any"),
    "services": ("/api/v1", "any"),
    "events": ("/api/v1", "any"),
    "jobs": ("/apis/batch/v1", "bot-0"),
    "networkpolicies": ("/apis/networking.k8s.io/v1", "bot-0"),
    "finetunejobs": ("/apis/finetune.dev/v1alpha1", "bot"),
    "roles": ("/apis/rbac.authorization.k8s.io/v1", "tenant"),
    "rolebindings": ("/apis/rbac.authorization.k8s.io/v1", "tenant"),
    "leases": ("/apis/coordination.k8s.io/v1", "any"),
}
PARTS = {"pods": ("log", "exec", "attach", "portforward", "eviction"), "serviceaccounts": ("token",),
         "finetunejobs": ("status",), "jobs": ("status",)}  # fmt: skip
METHODS = ("GET", "PUT", "PATCH", "DELETE")


@dataclass(frozen=True)
class Tenant:
    """A namespace, and the token of a person who may do nearly everything in it."""

    api: Api
    namespace: str
    token: str

    @classmethod
    async def create(cls, api: Api, namespace: str) -> "Tenant":
        base, where = "/apis/rbac.authorization.k8s.io/v1/namespaces", f"/api/v1/namespaces/{namespace}"
        (await api.create(f"{base}/{namespace}/roles", {"metadata": {"name": "tenant"}, "rules": OWN})).must(201)
        binding = {
            "metadata": {"name": "tenant"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "tenant"},
            "subjects": [{"kind": "ServiceAccount", "name": "tenant", "namespace": namespace}],
        }
        (await api.create(f"{base}/{namespace}/rolebindings", binding)).must(201)
        for account in ("tenant", "tuner"):
            (await api.create(f"{where}/serviceaccounts", {"metadata": {"name": account}})).must(201)
        secret = {"metadata": {"name": "s3"}, "stringData": {"AWS_ACCESS_KEY_ID": "key-of-" + namespace}}
        (await api.create(f"{where}/secrets", secret)).must(201)
        jobs = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
        (await api.create(jobs, job_manifest("bot", namespace))).must(201)
        return cls(api, namespace, await rights.token_of(api, namespace, "tenant"))

    async def call(self, method: str, path: str, body: Object | None = None) -> Answer:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        return await self.api.call(method, path, body=body, content_type=kind, token=self.token)


@pytest.fixture
async def tenants(api: Api, namespace: str) -> AsyncIterator[tuple[Tenant, Tenant]]:
    await install_crds(api)
    other = f"{namespace}b"
    (await api.create("/api/v1/namespaces", {"metadata": {"name": other}})).must(201)
    yield await Tenant.create(api, namespace), await Tenant.create(api, other)
    await api.delete(f"/api/v1/namespaces/{other}")


def requests(namespace: str) -> list[tuple[str, str, Object | None]]:
    """Everything that one may try on objects of a namespace."""
    found: list[tuple[str, str, Object | None]] = []
    for plural, (api, name) in NAMES.items():
        every = f"{api}/namespaces/{namespace}/{plural}"
        found += [("GET", every, None), ("GET", f"{every}?watch=true&timeoutSeconds=1", None), ("DELETE", every, None)]
        found.append(("POST", every, {"metadata": {"name": "new", "namespace": namespace}}))
        parts = ["", *(f"/{part}" for part in PARTS.get(plural, ()))]
        body = {"metadata": {"name": name, "namespace": namespace}}
        for part in parts:
            found += [(m, f"{every}/{name}{part}", None if m in ("GET", "DELETE") else body) for m in METHODS]
            if part:
                found.append(("POST", f"{every}/{name}{part}", {}))
    return found


async def test_nothing_of_the_other_namespace_is_to_be_had(tenants: tuple[Tenant, Tenant]) -> None:
    one, other = tenants
    # Where it is their own, the same token is good for something.
    own = f"/api/v1/namespaces/{one.namespace}/secrets/s3"
    assert (await one.call("GET", own)).must(200)["metadata"]["name"] == "s3"
    tried = requests(other.namespace)
    assert len(tried) > 80
    answers = await asyncio.gather(*(one.call(*request) for request in tried))
    # A verb that a part of an object does not have (405), and a part that the sandbox does not have (501), are refused
    # before anybody's rights are looked at.
    let_in = [(r[:2], a.status) for r, a in zip(tried, answers, strict=True) if a.status not in (403, 405, 501)]
    assert let_in == []
    assert sum(answer.status != 403 for answer in answers) < 40
    assert not any(other.namespace.encode() in str(a.body).encode() and a.status == 200 for a in answers)


async def test_nothing_of_the_whole_cluster_is_to_be_had(tenants: tuple[Tenant, Tenant]) -> None:
    one, _ = tenants
    paths = [f"{api}/{plural}" for plural, (api, _) in NAMES.items()]
    paths += ["/api/v1/nodes", "/api/v1/namespaces", "/apis/rbac.authorization.k8s.io/v1/clusterroles"]
    profiles = "/apis/finetune.dev/v1alpha1/finetuneprofiles"
    tried = [("GET", path, None) for path in paths]
    tried += [(method, f"{profiles}/p", {"metadata": {"name": "p"}}) for method in ("PUT", "PATCH", "DELETE")]
    tried += [("POST", profiles, {"metadata": {"name": "p"}}), ("PATCH", f"{profiles}/p/status", {"status": {}})]
    answers = await asyncio.gather(*(one.call(*request) for request in tried))
    assert [(r[:2], a.status) for r, a in zip(tried, answers, strict=True) if a.status != 403] == []


async def test_a_job_cannot_be_put_into_another_namespace(tenants: tuple[Tenant, Tenant]) -> None:
    one, other = tenants
    path = "/apis/finetune.dev/v1alpha1/namespaces/{}/finetunejobs"
    foreign = job_manifest("mine", other.namespace)
    assert (await one.call("POST", path.format(other.namespace), foreign)).status == 403
    # The path decides; a body that says otherwise is a mistake.
    assert (await one.call("POST", path.format(one.namespace), foreign)).status == 400
    owned = job_manifest("owned", one.namespace)
    theirs = (await one.api.get(f"{path.format(other.namespace)}/bot")).must(200)["metadata"]["uid"]
    owner = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": "bot", "uid": theirs}
    owned["metadata"]["ownerReferences"] = [owner]
    (await one.call("POST", path.format(one.namespace), owned)).must(201)
    assert (await one.api.get(f"{path.format(other.namespace)}/bot")).status == 200


@pytest.fixture
async def reporting(
    cluster: "Sandbox", api: Api, tenants: tuple[Tenant, Tenant], tmp_path: Path
) -> AsyncIterator[tuple[list[tuple[Reporting, Attempt]], object]]:
    """A running attempt of each tenant, and one progress server for both."""
    found = []
    for tenant in tenants:
        job = await Reporting.create(api, tenant.namespace)
        attempt = await job.attempt(0)
        await job.set_status(state="Running", attempts=[attempt.entry()])
        found.append((job, attempt))
    async with kube_cluster(cluster.kubeconfig) as kube, progress_server(kube, tmp_path / "tls") as (_, post):
        yield found, post


async def test_no_token_of_one_reports_on_the_others_job(reporting: tuple) -> None:  # type: ignore[type-arg]
    ((own, pod), (theirs, their_pod)), post = reporting
    own_token = await own.token(pod.pod)
    (await post(own.path, own_token, STATUS)).must(200)
    answer = await post(theirs.path, own_token, STATUS)
    assert "is not valid for audience" in answer.refused(401, "Unauthorized")
    # Whoever may ask for tokens of their own accounts may ask for any audience; the pod is still their own.
    aimed = await own.token(pod.pod, (audience(theirs.uid),))
    answer = await post(theirs.path, aimed, STATUS)
    assert own.namespace in answer.refused(403, "Forbidden")
    unbound = await own.token(None, (audience(theirs.uid),))
    assert own.namespace in (await post(theirs.path, unbound, STATUS)).refused(403, "Forbidden")
    both = await own.token(pod.pod, (audience(own.uid), audience(theirs.uid)))
    assert (await post(theirs.path, both, STATUS)).status == 403
    assert await theirs.trainer_status() == {}
    (await post(theirs.path, await theirs.token(their_pod.pod), STATUS)).must(200)


async def test_a_pod_that_calls_itself_the_others_reports_nothing(
    reporting: tuple,
    api: Api,  # type: ignore[type-arg]
) -> None:
    ((own, _), (theirs, their_pod)), post = reporting
    pods = f"/api/v1/namespaces/{own.namespace}/pods"
    labels = their_pod.pod["metadata"]["labels"]
    forged = {
        "metadata": {"name": their_pod.pod["metadata"]["name"], "labels": labels},
        "spec": {"schedulerName": "nobody", "containers": [{"name": "trainer", "image": "a.example/b:1"}]},
    }
    made = (await api.create(pods, forged)).must(201)
    token = await own.token(made, (audience(theirs.uid),))
    assert (await post(theirs.path, token, STATUS)).status == 403
    assert await theirs.trainer_status() == {}


async def test_the_address_of_the_others_job_cannot_be_written_in_another_way(
    reporting: tuple,  # type: ignore[type-arg]
) -> None:
    ((own, pod), (theirs, _)), post = reporting
    token = await own.token(pod.pod)
    base = "/apis/finetune.dev/v1alpha1/namespaces"
    for path in (
        f"{base}/{own.namespace}/../{theirs.namespace}/finetunejobs/{theirs.name}/status",
        f"{base}/{own.namespace}/finetunejobs/{own.name}/../../../{theirs.namespace}/finetunejobs/{theirs.name}/status",
        f"{base}/{own.namespace}%2f..%2f{theirs.namespace}/finetunejobs/{theirs.name}/status",
        f"{base}/{theirs.namespace}/finetunejobs/{theirs.name}/status?namespace={own.namespace}",
        f"{base}/{own.namespace}/finetunejobs/{theirs.name}/status",
        f"//{base}/{theirs.namespace}/finetunejobs/{theirs.name}/status",
    ):
        assert (await post(path, token, STATUS)).status in (400, 401, 404), path
    assert await theirs.trainer_status() == {}
