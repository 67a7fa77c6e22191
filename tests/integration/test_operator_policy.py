"""The operator's own account under the chart's policies: what it really makes is admitted, and nothing besides."""

import asyncio
import copy
import secrets
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from support import admitting, operators
from support.admitting import RBAC, registered
from support.api import Answer, Api, Object
from support.charting import of_kind
from support.manifests import job_manifest
from support.operating import GROUP
from support.operators import KINDS, WAYS, Way
from support.reporting import install_crds
from support.waiting import eventually
from support.world import make_profile

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]
EVERYTHING = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["create", "get", "update", "patch", "delete"]}]
DENIED = "ValidatingAdmissionPolicy"


@dataclass(frozen=True)
class Thief:
    """Whoever has the operator's token; RBAC keeps them from nothing, so that the policies are all there is."""

    api: Api
    namespace: str
    account: str
    """The operator's, with its namespace and name."""
    profile: str

    async def create(self, manifest: Object) -> Answer:
        return await self.api.create(operators.path(manifest), manifest, acting=self.account, dryRun="All")

    def gang(self, kind: str = "on GPUs") -> list[Object]:
        return operators.made(self.namespace, self.profile, kind)

    def job(self, kind: str = "on GPUs") -> Object:
        return next(m for m in reversed(self.gang(kind)) if m["kind"] == "Job")


@pytest.fixture
async def thief(api: Api, namespace: str) -> AsyncIterator[Thief]:
    async with installed(api, namespace, namespace) as found:
        yield found


@asynccontextmanager
async def installed(api: Api, namespace: str, system: str, **values: Any) -> AsyncIterator[Thief]:
    """The chart's policies in force, for an operator in the namespace `system`."""
    await install_crds(api)
    release, manifests = admitting.policies(namespace, system, **values)
    account = f"system:serviceaccount:{system}:{release}"
    profile = make_profile(release, default=False, serviceAccounts=["tuner"])
    del profile["metadata"]["resourceVersion"]
    ref = {"apiGroup": RBAC.split("/")[2], "kind": "ClusterRole", "name": release}
    role = {"metadata": {"name": release}, "rules": EVERYTHING}
    subjects = [{"kind": "ServiceAccount", "name": release, "namespace": system}]
    binding = {"metadata": {"name": release}, "roleRef": ref, "subjects": subjects}
    made = ((f"{GROUP}/finetuneprofiles", profile), (f"{RBAC}/clusterroles", role),
            (f"{RBAC}/clusterrolebindings", binding))  # fmt: skip
    for path, body in made:
        (await api.create(path, body)).must(201)
    found = Thief(api, namespace, account, release)
    try:
        async with registered(api, manifests):
            await in_force(found, [name for m in of_kind(manifests, "ValidatingAdmissionPolicy")
                                   if "-operator" in (name := m["metadata"]["name"])])  # fmt: skip
            yield found
    finally:
        for path, body in reversed(made):
            await api.delete(f"{path}/{body['metadata']['name']}")


async def in_force(thief: Thief, policies: Sequence[str]) -> None:
    """Waits until each of these policies denies something by itself: they take effect one after the other."""
    for policy in policies:
        wrong = thief.job("under an account")
        if policy.endswith("operator-jobs"):
            wrong["spec"]["template"]["spec"]["hostPID"] = True
        elif policy.endswith("operator-accounts"):
            wrong["spec"]["template"]["spec"]["serviceAccountName"] = "admin"
        else:
            wrong = next(m for m in thief.gang() if m["kind"] == "Service")
            wrong["metadata"]["name"] = "probe"
        said = f"'{policy}' with binding"
        await eventually(
            partial(thief.create, wrong),
            policy,
            until=lambda a, said=said: said in a.body.get("message", ""),
            timeout=30,
        )


async def answers(calls: Iterable[Awaitable[Answer]]) -> list[Answer]:
    """Some at a time: an API server refuses too many at once."""
    slots = asyncio.Semaphore(8)

    async def one(call: Awaitable[Answer]) -> Answer:
        async with slots:
            return await call

    return await asyncio.gather(*(one(call) for call in calls))


async def test_all_that_the_operator_makes_is_admitted(thief: Thief) -> None:
    await thief.api.create("/apis/node.k8s.io/v1/runtimeclasses", {"metadata": {"name": "nvidia"}, "handler": "nvidia"})
    made = {kind: thief.gang(kind) for kind in KINDS}
    made["network test"] = operators.network_test(thief.namespace, thief.profile)
    wrong = {}
    for kind, manifests in made.items():
        for manifest, answer in zip(manifests, await answers(map(thief.create, manifests)), strict=True):
            if answer.status != 201:
                wrong[f"{manifest['kind']} {manifest['metadata']['name']} of a job {kind}"] = answer.body
    assert wrong == {}
    assert sum(len(manifests) for manifests in made.values()) >= 45


async def test_no_way_out_is_admitted(thief: Thief) -> None:
    gang = thief.gang()
    kinds = {way.kind for way in WAYS}
    whole = {kind: next(m for m in reversed(gang) if m["kind"] == kind) for kind in kinds}

    def changed(way: Way) -> Object:
        made = copy.deepcopy(whole[way.kind])
        way.change(made)
        return made

    admitted, otherwise = [], {}
    for way, answer in zip(WAYS, await answers(thief.create(changed(way)) for way in WAYS), strict=True):
        if answer.status < 400:
            admitted.append(f"{way.kind}: {way.name}")
        elif DENIED not in str(answer.body):
            # Refused by the API's own rules, which is as good.
            otherwise[f"{way.kind}: {way.name}"] = (answer.status, answer.body["message"])
    print(f"{len(WAYS)} ways: {len(WAYS) - len(otherwise)} denied by policy, {len(otherwise)} invalid: {otherwise}")
    assert admitted == []
    assert all(status in (400, 422) for status, _ in otherwise.values()), otherwise
    assert len(WAYS) >= 120


async def test_kinds_that_it_never_makes_are_denied(thief: Thief) -> None:
    for stranger in operators.strangers(thief.job()):
        message = (await thief.create(stranger)).refused(403, "Forbidden")
        assert "the operator creates and deletes Jobs, Services, ConfigMaps and NetworkPolicies" in message


async def test_accounts_are_those_of_the_profile_that_the_job_names(thief: Thief) -> None:
    job = thief.job("under an account")
    (await thief.create(job)).must(201)
    job["spec"]["template"]["spec"]["serviceAccountName"] = "admin"
    message = (await thief.create(job)).refused(403, "Forbidden")
    assert f"allowed are the serviceAccounts of the FineTuneProfile {thief.profile}" in message
    del job["metadata"]["annotations"]
    assert "serviceAccountName: found admin" in (await thief.create(job)).refused(403, "Forbidden")


async def test_accounts_that_the_chart_lists_depend_on_no_profile(api: Api, namespace: str) -> None:
    async with installed(api, namespace, namespace, serviceAccounts=["trainer"]) as thief:
        job = thief.job("under an account")
        assert "of the chart: trainer" in (await thief.create(job)).refused(403, "Forbidden")
        job["spec"]["template"]["spec"]["serviceAccountName"] = "trainer"
        (await thief.create(job)).must(201)


async def test_nothing_but_its_test_is_made_where_the_operator_runs(api: Api, namespace: str) -> None:
    system = f"{namespace}-system"
    (await api.create("/api/v1/namespaces", {"metadata": {"name": system}})).must(201)
    async with installed(api, namespace, system) as thief:
        for manifest in operators.network_test(system, thief.profile):
            (await thief.create(manifest)).must(201)
            elsewhere = copy.deepcopy(manifest)
            elsewhere["metadata"]["namespace"] = namespace
            (await thief.create(elsewhere)).refused(403, "Forbidden")
            named = copy.deepcopy(manifest)
            named["metadata"]["name"] = "nettest"
            (await thief.create(named)).refused(403, "Forbidden")
        for manifest in thief.gang():
            manifest["metadata"]["namespace"] = system
            assert f"is not in kube-system, kube-public, kube-node-lease, {system}" in (
                (await thief.create(manifest)).refused(403, "Forbidden")
            )
    await api.delete(f"/api/v1/namespaces/{system}")


async def test_it_changes_nothing_and_deletes_what_is_its_own(thief: Thief) -> None:
    api, maps = thief.api, operators.PATHS["ConfigMap"].format(thief.namespace)
    (await api.create(maps, {"metadata": {"name": "theirs"}, "data": {"a": "b"}})).must(201)
    for call in (
        api.delete(f"{maps}/theirs", acting=thief.account),
        api.patch(f"{maps}/theirs", {"data": {"a": "c"}}, acting=thief.account),
    ):
        assert DENIED in (await call).refused(403, "Forbidden")
    name = f"j-{secrets.token_hex(3)}"
    jobs = f"{GROUP}/namespaces/{thief.namespace}/finetunejobs"
    owner = (await api.create(jobs, job_manifest(name, thief.namespace, profile=thief.profile))).must(201)["metadata"]
    own = next(m for m in thief.gang() if m["kind"] == "ConfigMap")
    own["metadata"]["ownerReferences"][0] |= {"name": name, "uid": owner["uid"]}
    own["metadata"] |= {"name": f"{name}-0"}
    own["metadata"]["labels"] |= {"finetune.dev/job-name": name, "finetune.dev/attempt": "0"}
    (await api.create(maps, own, acting=thief.account)).must(201)
    note = {"metadata": {"annotations": {"a": "b"}}}
    assert DENIED in (await api.patch(f"{maps}/{name}-0", note, acting=thief.account)).refused(403, "Forbidden")
    (await api.delete(f"{maps}/{name}-0", acting=thief.account)).must(200)
