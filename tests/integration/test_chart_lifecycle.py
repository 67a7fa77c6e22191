"""Install, run a job, upgrade, uninstall and install again, by Helm, with a job that runs all the while."""

import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from support.admitting import REGISTRATION, tenant
from support.api import Api, Object
from support.charting import CHART, LOADER, ROOT, render
from support.clusters import running
from support.installing import NAMESPACE, RELEASE, Release
from support.manifests import job_manifest
from support.operating import GROUP, Scene
from support.waiting import eventually

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PROFILE = {"image": "example.com/trainer@sha256:" + "0" * 64, "serviceAccounts": ["tuner"]}
RIGHTS = [
    {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["create", "get", "patch", "delete"]},
    {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["s3"], "verbs": ["use"]},
]


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator["Sandbox"]:
    """A cluster in which nothing is installed."""
    with running(tmp_path / "cluster", node=False, s3=False) as sandbox:
        yield sandbox


@pytest.fixture
async def release(fresh: "Sandbox", tmp_path: Path) -> AsyncIterator[Release]:
    async with Api.connect(fresh.kubeconfig) as api:
        made = Release(fresh, api, tmp_path)
        yield made
        await made.stop()


async def team(api: Api) -> tuple[Scene, str]:
    (await api.create("/api/v1/namespaces", {"metadata": {"name": "team-a"}})).must(201)
    token = await tenant(api, "team-a", "alice", RIGHTS)
    nobody: Any = None
    return Scene(api, "team-a", "default", nobody, nobody), token


def job(name: str, secret: str = "s3") -> Object:
    return job_manifest(name, "team-a", credentials={"secretRef": {"name": secret}})


async def upgrade_crds(api: Api) -> None:
    """`kubectl apply --server-side --field-manager=helm --force-conflicts -f crds/`: Helm leaves this to its user."""
    for file in sorted((CHART / "crds").iterdir()):
        crd = yaml.load(file.read_text(), LOADER)
        path = f"{CRDS}/{crd['metadata']['name']}"
        (await api.patch(path, crd, "apply", fieldManager="helm", force="true")).must(200)


def before(folder: Path) -> Path:
    """The chart of a version that had neither `minWorkers` nor the profile's `dataCache`."""
    shutil.copytree(CHART, folder)
    for file in (folder / "crds").iterdir():
        crd = yaml.load(file.read_text(), LOADER)
        spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
        if crd["spec"]["names"]["kind"] == "FineTuneJob":
            del spec["distribution"]["properties"]["minWorkers"]
            del spec["distribution"]["x-kubernetes-validations"]
        else:
            del spec["dataCache"]
        file.write_text(json.dumps(crd))
    return folder


async def facts(scene: Scene) -> Object:
    """What must be the same afterwards."""
    pods = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in await scene.pods("j-0")}
    status = await scene.status()
    (attempt,) = status["attempts"]
    stored = (await scene.api.get(scene.job_path())).must(200)
    return {"pods": pods, "attempt": attempt["uid"], "uid": stored["metadata"]["uid"], "spec": stored["spec"]}


async def test_a_job_outlives_upgrades_and_the_release_itself(release: Release, tmp_path: Path) -> None:
    api = release.api
    profile = {"create": True, "name": "default", "spec": PROFILE}
    await release.install(before(tmp_path / "chart"), defaultProfile=profile)
    await release.certificates()
    await release.connect()
    await release.roll(2)
    scene, token = await team(api)

    async def create(manifest: Object, **params: Any) -> Any:
        return await api.create(scene.path("finetunejobs", api=GROUP), manifest, token=token, **params)

    # Everything that was installed has a part in this.
    answer = await eventually(
        lambda: create(job("j", "theirs"), dryRun="All"),
        "a refusal",
        until=lambda a: "may name only" in str(a.body),
        timeout=30,
    )
    assert "spec.credentials.secretRef.name: found" in answer.refused(403, "Forbidden")
    await eventually(
        lambda: create(job("j"), dryRun="All"), "a webhook that answers", until=lambda a: a.status == 201, timeout=30
    )
    (await create(job("j"))).must(201)
    await scene.prepared()
    await scene.run("j-0")
    await scene.reaches("Running")
    was, authority = await facts(scene), (await release.secret())["ca.crt"]

    # Upgrade: the new CRDs first, then the release.
    await upgrade_crds(api)
    values = {"defaultProfile": profile | {"spec": PROFILE | {"dataCache": "1Gi"}}}
    await release.upgrade(logLevel="DEBUG", **values)
    await release.roll(2)
    assert await facts(scene) == was
    assert (await release.secret())["ca.crt"] == authority
    stored = (await api.get(f"{GROUP}/finetuneprofiles/default")).must(200)
    assert stored["spec"]["dataCache"] == "1Gi"
    wide = job("wide")
    wide["spec"] |= {"distribution": {"workers": 2, "minWorkers": 1}, "runPolicy": {"preRunningDeadlineSeconds": 60}}
    answer = await eventually(
        lambda: create(wide, dryRun="All"), "the new webhook", until=lambda a: a.status == 201, timeout=30
    )
    assert answer.body["spec"]["distribution"]["minWorkers"] == 1
    # What the upgrade put into the webhook's configuration did not take its authority away.
    configuration = (await api.get(f"{REGISTRATION}/validatingwebhookconfigurations/{RELEASE}")).must(200)
    assert all(webhook["clientConfig"]["caBundle"] for webhook in configuration["webhooks"])

    # Uninstall: jobs, profiles that are not the release's and their pods stay; nothing stands in anybody's way.
    await release.uninstall()
    await release.stop()
    assert (await api.get(f"{REGISTRATION}/validatingwebhookconfigurations/{RELEASE}")).status == 404
    assert await api.items(f"{REGISTRATION}/validatingadmissionpolicies") == []
    assert await facts(scene) == was
    await scene.completed("j-0")

    # Install again: the job's end is noticed, and the authority that pods trust is the same.
    await release.install(CHART, **values)
    await release.certificates()
    await release.connect()
    await release.roll(1)
    await scene.reaches("Complete", timeout=40)
    status = await scene.status()
    assert [(a["uid"], a["outcome"]) for a in status["attempts"]] == [(was["attempt"], "Succeeded")]
    assert (await release.secret())["ca.crt"] == authority
    await eventually(
        lambda: create(job("k"), dryRun="All"), "a webhook that answers", until=lambda a: a.status == 201, timeout=30
    )
    (await api.delete(scene.job_path(), token=token)).must(200)


def test_the_authority_and_what_tenants_made_are_not_the_releases() -> None:
    """What Helm would delete: nothing that a running job needs."""
    kinds = {manifest["kind"] for manifest in render()}
    assert kinds.isdisjoint({"Secret", "CustomResourceDefinition", "FineTuneJob", "Namespace"})
    assert NAMESPACE not in {m["metadata"]["name"] for m in render()}


PLURALS = {"NetworkPolicy": "networkpolicies", "ValidatingAdmissionPolicy": "validatingadmissionpolicies"}


async def test_an_api_server_takes_every_manifest_strictly(api: Api) -> None:
    """Those of the plain YAML, and those that are behind values; nothing of it is kept."""
    await api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    behind = {"networkPolicy": {"enabled": True}, "metrics": {"dashboards": {"enabled": True}}}
    manifests = list(yaml.load_all((ROOT / "deploy/operator.yaml").read_text(), LOADER)) + render(behind)
    wrong = {}
    for manifest in manifests:
        api_version, kind, meta = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
        base = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        scope = f"/namespaces/{meta['namespace']}" if "namespace" in meta else ""
        path = f"{base}{scope}/{PLURALS.get(kind, kind.lower() + 's')}/{meta['name']}"
        options = {"fieldManager": "test", "fieldValidation": "Strict", "dryRun": "All", "force": "true"}
        answer = await api.patch(path, manifest, "apply", **options)
        if answer.status not in (200, 201):
            wrong[f"{kind}/{meta['name']}"] = answer.body
    assert wrong == {}
