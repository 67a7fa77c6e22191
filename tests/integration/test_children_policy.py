"""Accounts that may touch what the operator makes: Kubernetes' own as far as they need to, tenants hardly any.

The accounts are impersonated, so that a control plane of any make is told from a tenant by its names alone.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from support import admitting, forging, operators
from support.admitting import RBAC, registered
from support.api import Answer, Api, Object
from support.forging import KINDS
from support.reporting import install_crds
from support.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
SYSTEM = "system:serviceaccount:kube-system:"
KUEUE = "system:serviceaccount:kueue-system:kueue-controller-manager"
MANAGER, COLLECTOR, JOBS = (
    "system:kube-controller-manager",
    f"{SYSTEM}generic-garbage-collector",
    f"{SYSTEM}job-controller",
)
NAMESPACES, KUBELET, SCHEDULER = f"{SYSTEM}namespace-controller", "system:node:node-a", "system:kube-scheduler"
NETWORK = f"{SYSTEM}calico-node"
GROUPS: Mapping[str, str] = {KUBELET: "system:nodes"}
NOTE: Object = {"metadata": {"annotations": {"note": "x"}}}
EVERYTHING = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["create", "get", "update", "patch", "delete"]}]
CHANGES: Mapping[str, tuple[str, ...]] = {
    "gang": (MANAGER, COLLECTOR, JOBS, NAMESPACES, KUEUE),
    "gang/status": (MANAGER, COLLECTOR, JOBS, NAMESPACES, KUEUE, NETWORK, SCHEDULER, KUBELET),
    "pod": (MANAGER, COLLECTOR, JOBS, NAMESPACES, KUEUE, NETWORK, SCHEDULER, KUBELET),
    "pod/status": (MANAGER, COLLECTOR, JOBS, NAMESPACES, KUEUE, NETWORK, SCHEDULER, KUBELET),
    "configmap": (MANAGER, COLLECTOR, JOBS, NAMESPACES),
    "service": (MANAGER, COLLECTOR, JOBS, NAMESPACES),
    "networkpolicy": (MANAGER, COLLECTOR, JOBS, NAMESPACES),
}
DELETIONS: Mapping[str, tuple[str, ...] | None] = {
    "gang": None,
    "pod": None,
    "configmap": (MANAGER, COLLECTOR, JOBS, NAMESPACES),
    "service": (MANAGER, COLLECTOR, JOBS, NAMESPACES),
    "networkpolicy": (MANAGER, COLLECTOR, JOBS, NAMESPACES),
}
"""None: everybody who has the right."""
TENANT = "alice"
ACCOUNTS = (
    MANAGER,
    COLLECTOR,
    JOBS,
    NAMESPACES,
    KUEUE,
    NETWORK,
    SCHEDULER,
    KUBELET,
    TENANT,
    f"{SYSTEM}cronjob-controller",
)


@dataclass(frozen=True)
class Guarded:
    """What the operator has made for a job, under the policies; RBAC keeps nobody from anything."""

    api: Api
    namespace: str
    paths: Mapping[str, str]

    async def change(self, kind: str, account: str, **params: Any) -> Answer:
        kind, _, part = kind.partition("/")
        where = self.paths[kind] + (f"/{part}" if part else "")
        return await self.api.patch(where, NOTE, dryRun="All", **acting(account), **params)

    async def delete(self, kind: str, account: str, policy: str) -> Answer:
        options = {"dryRun": ["All"], "propagationPolicy": policy}
        return await self.api.delete(self.paths[kind], options, dryRun="All", **acting(account))

    async def create(self, kind: str, body: Object, account: str) -> Answer:
        api, plural, _ = KINDS[kind]
        return await self.api.create(
            f"{api}/namespaces/{self.namespace}/{plural}", body, dryRun="All", **acting(account)
        )


def acting(account: str) -> dict[str, str]:
    return {"acting": account} | ({"group": GROUPS[account]} if account in GROUPS else {})


@pytest.fixture
async def guarded(api: Api, namespace: str) -> AsyncIterator[Guarded]:
    await install_crds(api)
    role = {"metadata": {"name": namespace}, "rules": EVERYTHING}
    (await api.create(f"{RBAC}/namespaces/{namespace}/roles", role)).must(201)
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": namespace}
    subjects = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": name} for name in ACCOUNTS]
    binding = {"metadata": {"name": namespace}, "roleRef": ref, "subjects": subjects}
    (await api.create(f"{RBAC}/namespaces/{namespace}/rolebindings", binding)).must(201)
    paths = {}
    for manifest in operators.made(namespace, "p", "on GPUs")[-4:]:
        # Without an owner that is not there: it would be collected. Its labels say as well whose it is.
        del manifest["metadata"]["ownerReferences"]
        manifest["spec"] = manifest["spec"] | {"suspend": True} if manifest["kind"] == "Job" else manifest.get("spec")
        kind = "gang" if manifest["kind"] == "Job" else manifest["kind"].lower()
        collection = operators.path(manifest)
        (await api.create(collection, {k: v for k, v in manifest.items() if v is not None})).must(201)
        paths[kind] = f"{collection}/{manifest['metadata']['name']}"
    pod = {**marked("support-bot-12-0"), "spec": idle()}
    (await api.create(f"/api/v1/namespaces/{namespace}/pods", pod)).must(201)
    paths["pod"] = f"/api/v1/namespaces/{namespace}/pods/support-bot-12-0"
    _, manifests = admitting.policies(namespace)
    found = Guarded(api, namespace, paths)
    async with registered(api, manifests):
        await eventually(
            lambda: found.change("service", TENANT),
            "a refusal",
            until=lambda answer: "ValidatingAdmissionPolicy" in str(answer.body),
            timeout=30,
        )
        yield found


def marked(name: str, **members: Any) -> Object:
    labels = {"finetune.dev/job-name": "support-bot", "finetune.dev/attempt": "12"}
    return {"metadata": {"name": name, "labels": labels, **members}}


def idle() -> Object:
    return {"schedulerName": "nobody", "containers": [{"name": "trainer", "image": "a.example/b:1"}]}


async def test_each_account_changes_what_it_needs_to(guarded: Guarded) -> None:
    wrong = {}
    for kind, allowed in CHANGES.items():
        for account in ACCOUNTS:
            answer = await guarded.change(kind, account)
            network = account.startswith(SYSTEM) and NETWORK in allowed
            wanted = 200 if account in allowed or network else 403
            if answer.status != wanted:
                wrong[f"{account} changes a {kind}"] = (answer.status, answer.body)
    assert wrong == {}


async def test_jobs_and_pods_may_be_deleted_and_what_isolates_them_may_not(guarded: Guarded) -> None:
    wrong = {}
    for kind, allowed in DELETIONS.items():
        for account in ACCOUNTS:
            for policy in ("Background", "Foreground", "Orphan"):
                answer = await guarded.delete(kind, account, policy)
                keeper = account in (MANAGER, COLLECTOR, JOBS, NAMESPACES)
                orphaned = kind == "gang" and policy == "Orphan" and not keeper
                wanted = 200 if (allowed is None or account in allowed) and not orphaned else 403
                if answer.status != wanted:
                    wrong[f"{account} deletes a {kind} ({policy})"] = (answer.status, answer.body)
    assert wrong == {}


async def test_pods_are_made_by_the_job_controller_alone(guarded: Guarded) -> None:
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "support-bot-12", "uid": "u", "controller": True}
    replicas = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "mine", "uid": "u", "controller": True}
    for account in ACCOUNTS:
        for ref, by in ((owner, (MANAGER, JOBS)), (replicas, ()), (None, ())):
            body = {**marked("p", **({"ownerReferences": [ref]} if ref else {})), "spec": idle()}
            answer = await guarded.create("pod", body, account)
            assert answer.status == (201 if account in by else 403), (account, ref, answer.body)


async def test_a_job_is_not_made_for_its_pods_either(guarded: Guarded) -> None:
    """By nobody: neither the template's labels nor a CronJob's controller are a way round."""
    _, job = forging.template_only(guarded.namespace)
    for account in ACCOUNTS:
        message = (await guarded.create("gang", job, account)).refused(403, "Forbidden")
        assert f"jobs: found a creation by {account}" in message
        assert "change the FineTuneJob instead" in message


async def test_who_may_do_everything_with_jobs_may_mend_what_is_made_of_them(guarded: Guarded) -> None:
    for kind, path in guarded.paths.items():
        (await guarded.api.patch(path, NOTE)).must(200)
        (await guarded.api.delete(path, {"propagationPolicy": "Orphan"})).must(200), kind


async def test_what_is_nobodys_is_no_concern_of_the_policies(guarded: Guarded) -> None:
    names = {"labels": {"app": "mine", "app.kubernetes.io/managed-by": "Helm"}}
    bodies = {
        "configmap": {"metadata": {"name": "mine", **names}, "data": {}},
        "service": {"metadata": {"name": "mine"}, "spec": {"ports": [{"port": 1}]}},
        "pod": {"metadata": {"name": "mine", **names}, "spec": idle()},
        "networkpolicy": {"metadata": {"name": "mine"}, "spec": {"podSelector": {}}},
        "gang": {"metadata": {"name": "mine"}, "spec": {"template": {"spec": idle() | {"restartPolicy": "Never"}}}},
    }
    for kind, body in bodies.items():
        (await guarded.create(kind, body, TENANT)).must(201)
