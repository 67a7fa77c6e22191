"""What each layer of admission refuses by itself, on an API server: policies without a webhook, a webhook without
policies, and both with nobody who answers. What the schema alone refuses is in test_escapes."""

import copy
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support import admitting, escapes
from support.admitting import PATH, registered, tenant, webhook_server
from support.api import Answer, Api, Object
from support.escapes import Escape
from support.manifests import job_manifest
from support.operating import GROUP
from support.reporting import install_crds, kube_cluster
from support.rights import token_of
from support.waiting import eventually
from support.world import make_profile

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
POLICIES = "validatingadmissionpolicies"
RIGHTS = [
    {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["create", "get", "patch", "delete"]},
    {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs/status"], "verbs": ["patch"]},
    {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["s3", "tracking"], "verbs": ["use"]},
    {"apiGroups": [""], "resources": ["serviceaccounts"], "resourceNames": ["tuner"], "verbs": ["impersonate"]},
]


@dataclass(frozen=True)
class Tenancy:
    """A namespace with a profile of its own, and one who may create jobs there."""

    api: Api
    namespace: str
    token: str

    @property
    def jobs(self) -> str:
        return f"{GROUP}/namespaces/{self.namespace}/finetunejobs"

    def job(self, name: str = "j", **spec: Any) -> Object:
        own: Object = {"profile": self.namespace, "output": {"uri": f"s3://adapters/{self.namespace}/"}}
        return job_manifest(name, self.namespace, **own | spec)

    def escape(self, escape: Escape) -> Object:
        made = escape.manifest(output={"uri": f"s3://adapters/{self.namespace}/"})
        # Of another namespace; the corpus names it by a name that every cluster has once.
        other = f"{self.namespace}-b"
        made["spec"]["profile"] = {None: self.namespace, "other": other}.get(made["spec"].get("profile"), "absent")
        return made

    async def create(self, job: Object, **params: Any) -> Answer:
        return await self.api.create(self.jobs, job, token=self.token, **params)

    async def refused_until(self, words: str, job: Object) -> None:
        """Registrations take effect some time after they are stored."""
        await eventually(
            lambda: self.create(job, dryRun="All"), words, until=lambda answer: words in str(answer.body.get("message"))
        )


@pytest.fixture
async def tenancy(api: Api, namespace: str) -> AsyncIterator[Tenancy]:
    await install_crds(api)
    limits: Object = {
        "allowedNamespaces": [namespace],
        "serviceAccounts": ["listed", "tuner"],
        "limits": {"maxWorkers": 8, "maxActiveDeadlineSeconds": 86_400},
        "allowedUris": {
            "baseModel": ["s3://models/"],
            "datasets": ["s3://data/"],
            "output": ["s3://adapters/{namespace}/"],
        },
    }
    made = [make_profile(namespace, default=False, **limits)]
    made.append(make_profile(f"{namespace}-b", default=False, allowedNamespaces=["team-b"]))
    for profile in made:
        del profile["metadata"]["resourceVersion"]
        (await api.create(f"{GROUP}/finetuneprofiles", profile)).must(201)
    found = Tenancy(api, namespace, await tenant(api, namespace, "alice", RIGHTS))
    await eventually(
        lambda: found.create(found.job(), dryRun="All"), "rights", until=lambda answer: answer.status == 201
    )
    yield found
    for profile in made:
        await api.delete(f"{GROUP}/finetuneprofiles/{profile['metadata']['name']}")


@asynccontextmanager
async def policies(tenancy: Tenancy) -> AsyncIterator[str]:
    """In force; the account of the operator that they know."""
    release, manifests = admitting.policies(tenancy.namespace)
    async with registered(tenancy.api, manifests):
        await tenancy.refused_until(f"{release}-authors", tenancy.job(credentials={"secretRef": {"name": "x"}}))
        yield release


@asynccontextmanager
async def webhook(tenancy: Tenancy, kubeconfig: Path, folder: Path) -> AsyncIterator[None]:
    async with kube_cluster(kubeconfig) as kube, webhook_server(kube, folder) as (server, _):
        url = f"https://127.0.0.1:{server.port}{PATH}"
        manifests = admitting.webhooks(tenancy.namespace, url, (folder / "ca.crt").read_bytes())
        async with registered(tenancy.api, manifests):
            await tenancy.refused_until("admission webhook", tenancy.job(credentials={"secretRef": {"name": "x"}}))
            yield


NAMING: tuple[tuple[str, Object, bool], ...] = (
    ("spec.credentials.secretRef.name", {"credentials": {"secretRef": {"name": "s3"}}}, True),
    ("spec.credentials.secretRef.name", {"credentials": {"secretRef": {"name": "theirs"}}}, False),
    ("spec.credentials.serviceAccountName", {"credentials": {"serviceAccountName": "tuner"}}, True),
    ("spec.credentials.serviceAccountName", {"credentials": {"serviceAccountName": "listed"}}, False),
    (
        "spec.tracking.mlflow.secretRef.name",
        {"tracking": {"mlflow": {"uri": "https://mlflow.example", "secretRef": {"name": "theirs"}}}},
        False,
    ),
    (
        "spec.tracking.wandb.secretRef.name",
        {"tracking": {"wandb": {"project": "p", "secretRef": {"name": "theirs"}}}},
        False,
    ),
)


async def test_policies_alone_hold_authors_to_what_is_theirs(tenancy: Tenancy) -> None:
    async with policies(tenancy):
        for field, spec, allowed in NAMING:
            answer = await tenancy.create(tenancy.job(**spec), dryRun="All")
            if allowed:
                answer.must(201)
            else:
                message = answer.refused(403, "Forbidden")
                assert f"{field}: found " in message
                assert f"system:serviceaccount:{tenancy.namespace}:alice may name only" in message
            # Who may do everything may name everything.
            (await tenancy.api.create(tenancy.jobs, tenancy.job(**spec), dryRun="All")).must(201)
        for escape in escapes.of("Author"):
            answer = await tenancy.create(tenancy.escape(escape))
            assert escape.words in answer.refused(403, "Forbidden"), escape.name
        own = tenancy.job(tracking={"wandb": {"project": "p", "secretRef": {"name": "tracking"}}})
        (await tenancy.create(own, dryRun="All")).must(201)


async def test_the_policies_are_of_the_types_that_the_crds_have(cluster: Any, tenancy: Tenancy) -> None:
    if cluster.name != "kubernetes":
        pytest.skip("the sandbox checks no types: it runs the expressions")
    async with policies(tenancy):
        found = [p["metadata"]["name"] for p in await tenancy.api.items(f"{admitting.REGISTRATION}/{POLICIES}")]
        assert len(found) >= 6
        for name in found:
            path = f"{admitting.REGISTRATION}/{POLICIES}/{name}"
            checked = await eventually(
                partial(tenancy.api.get, path), "types", until=lambda a: "typeChecking" in (a.body.get("status") or {})
            )
            assert checked.body["status"]["typeChecking"] == {}


async def test_the_status_is_the_operators_whatever_a_role_says(tenancy: Tenancy) -> None:
    async with policies(tenancy) as release:
        (await tenancy.create(tenancy.job())).must(201)
        path, forged = f"{tenancy.jobs}/j/status", {"status": {"attemptCount": 0}}
        message = (await tenancy.api.patch(path, forged, token=tenancy.token)).refused(403, "Forbidden")
        assert f"only system:serviceaccount:{tenancy.namespace}:{release} writes it" in message
        await tenant(tenancy.api, tenancy.namespace, release, RIGHTS)
        operators = await token_of(tenancy.api, tenancy.namespace, release)
        await eventually(
            lambda: tenancy.api.patch(path, {"status": {"state": "Pending"}}, token=operators),
            "the operator's rights",
            until=lambda answer: answer.status == 200,
        )
        (await tenancy.api.patch(path, forged)).must(200)
        # Nothing keeps a tenant from suspending and deleting.
        change = {"spec": {"runPolicy": {"suspend": True}}}
        (await tenancy.api.patch(f"{tenancy.jobs}/j", change, token=tenancy.token)).must(200)
        (await tenancy.api.delete(f"{tenancy.jobs}/j", token=tenancy.token)).must(200)


async def test_the_webhook_alone_refuses_what_takes_a_look_up(cluster: Any, tenancy: Tenancy, tmp_path: Path) -> None:
    async with webhook(tenancy, cluster.kubeconfig, tmp_path / "tls"):
        (await tenancy.create(tenancy.job(), dryRun="All")).must(201)
        wrong = {}
        for escape in escapes.of("Lookup", "Author"):
            answer = await tenancy.create(tenancy.escape(escape), dryRun="All")
            if answer.status not in (403, 422) or escape.words not in answer.body["message"]:
                wrong[escape.name] = (answer.status, str(answer.body)[:300])
        assert wrong == {}
        # It is no error to come before one's profile: such a job is admitted, and waits.
        (await tenancy.create(tenancy.job(profile="absent"), dryRun="All")).must(201)
        for field, spec, allowed in NAMING[:4]:
            answer = await tenancy.create(tenancy.job(**spec), dryRun="All")
            assert answer.status == (201 if allowed else 403), (field, answer.body)


async def test_a_stricter_profile_keeps_nobody_from_suspending(cluster: Any, tenancy: Tenancy, tmp_path: Path) -> None:
    async with webhook(tenancy, cluster.kubeconfig, tmp_path / "tls"):
        (await tenancy.create(tenancy.job(distribution={"workers": 2}))).must(201)
        path = f"{GROUP}/finetuneprofiles/{tenancy.namespace}"
        (await tenancy.api.patch(path, {"spec": {"limits": {"maxWorkers": 1}}})).must(200)
        again = tenancy.job("again", distribution={"workers": 2})
        await tenancy.refused_until("at most 1", again)
        change = {"spec": {"runPolicy": {"suspend": True}}}
        (await tenancy.api.patch(f"{tenancy.jobs}/j", change, token=tenancy.token)).must(200)
        longer = {"spec": {"runPolicy": {"activeDeadlineSeconds": 86_401}}}
        answer = await tenancy.api.patch(f"{tenancy.jobs}/j", longer, token=tenancy.token)
        assert "at most 86400" in answer.refused(403, "Forbidden")


async def test_nothing_is_admitted_and_everything_deleted_while_the_webhook_is_away(
    cluster: Any, tenancy: Tenancy, tmp_path: Path
) -> None:
    folder = tmp_path / "tls"
    async with kube_cluster(cluster.kubeconfig) as kube:
        async with webhook_server(kube, folder) as (server, _):
            url = f"https://127.0.0.1:{server.port}{PATH}"
            manifests = admitting.webhooks(tenancy.namespace, url, (folder / "ca.crt").read_bytes())
        (await tenancy.create(tenancy.job("before"))).must(201)
        async with registered(tenancy.api, manifests):
            await tenancy.refused_until("failed calling webhook", tenancy.job())
            wrong = {}
            for escape in escapes.ESCAPES:
                if escape.layer != "Update":
                    answer = await tenancy.create(tenancy.escape(escape), fieldValidation="Strict")
                    if answer.status < 400:
                        wrong[escape.name] = answer.body
            assert wrong == {}
            path = f"{tenancy.jobs}/before"
            # What the operator writes is no tenant's: it goes on.
            (await tenancy.api.patch(f"{path}/status", {"status": {"state": "Pending"}})).must(200)
            (await tenancy.api.delete(path, token=tenancy.token)).must(200)
            assert await tenancy.api.items(tenancy.jobs) == []


async def test_both_layers_say_the_same(cluster: Any, tenancy: Tenancy, tmp_path: Path) -> None:
    """Word for word but for who says it, so that it does not matter who is asked first."""
    job = tenancy.job(credentials={"secretRef": {"name": "theirs"}})
    said = []
    async with policies(tenancy):
        said.append((await tenancy.create(copy.deepcopy(job))).refused(403, "Forbidden"))
    await eventually(lambda: tenancy.create(job, dryRun="All"), "no policy", until=lambda answer: answer.status == 201)
    async with webhook(tenancy, cluster.kubeconfig, tmp_path / f"tls-{secrets.token_hex(2)}"):
        said.append((await tenancy.create(copy.deepcopy(job))).refused(403, "Forbidden"))
    sentences = {text[text.index("spec.credentials") :].replace("'", "") for text in said}
    assert len(sentences) == 1, sentences
