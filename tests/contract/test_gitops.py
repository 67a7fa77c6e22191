"""examples/gitops: what is in it would be admitted, and Argo CD and kstatus know how a job is."""

import datetime
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import lupa.lua54 as lua
import pytest
import yaml

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage
from finetune_api.job import parse
from finetune_api.policy import judge
from finetune_api.profile import DEFAULT_ANNOTATION, FineTuneProfile
from finetune_api.support import unsupported_profile
from support.charting import LOADER, ROOT
from support.world import RESULT, World, make_job

TREE = ROOT / "examples" / "gitops"
TENANTS = ("team-a", "team-b")
Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    return [document for document in yaml.load_all(path.read_text(), LOADER) if document]


def manifests(folder: Path) -> Iterator[Object]:
    for file in sorted(folder.rglob("*.yaml")):
        yield from documents(file)


def profiles() -> list[FineTuneProfile]:
    found = [m for m in manifests(TREE / "profiles") if m["kind"] == "FineTuneProfile"]
    return [FineTuneProfile.model_validate(m) for m in found]


def test_what_kubernetes_knows_is_valid() -> None:
    for manifest in manifests(TREE):
        group = manifest["apiVersion"].split("/")[0]
        if group not in ("finetune.dev", "argoproj.io", "kustomize.toolkit.fluxcd.io", "kustomize.config.k8s.io"):
            kubernetes_validate.validate(manifest, "1.29", strict=True)


def test_every_kustomization_names_what_is_there() -> None:
    for file in TREE.rglob("kustomization.yaml"):
        (kustomization,) = documents(file)
        for resource in kustomization["resources"]:
            assert (file.parent / resource).exists(), (file, resource)


def test_profiles_can_be_used_and_one_is_the_default() -> None:
    found = profiles()
    assert [unsupported_profile(profile.spec) for profile in found] == [[]] * len(found)
    assert [p.metadata.name for p in found if p.metadata.annotations.get(DEFAULT_ANNOTATION) == "true"] == ["cpu"]
    for profile in found:
        assert "@sha256:" in profile.spec.image
        assert all("{namespace}" in prefix for prefix in profile.spec.allowed_uris.output)


@pytest.mark.parametrize("tenant", TENANTS)
def test_a_tenants_jobs_would_be_admitted_there_and_nowhere_else(tenant: str) -> None:
    by_name = {profile.metadata.name: profile for profile in profiles()}
    (kustomization,) = documents(TREE / "jobs" / tenant / "kustomization.yaml")
    assert kustomization["namespace"] == tenant
    for name in kustomization["resources"]:
        (manifest,) = documents(TREE / "jobs" / tenant / name)
        profile = by_name[manifest["spec"].get("profile", "cpu")]
        for namespace in TENANTS:
            job = parse(manifest | {"metadata": manifest["metadata"] | {"namespace": namespace}})
            problems = judge(job, profile)
            assert (problems == []) is (namespace == tenant), problems


def test_a_tenant_may_use_a_secret_and_read_none() -> None:
    (role,) = (m for m in manifests(TREE / "tenants") if m["kind"] == "Role")
    for rule in role["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        assert not any(resource.endswith("/status") for resource in rule["resources"])
        if "secrets" in rule["resources"]:
            assert (rule["verbs"], rule["resourceNames"]) == (["use"], ["s3-creds"])
        if rule["apiGroups"] != ["finetune.dev"]:
            assert {"create", "patch", "update", "delete"}.isdisjoint(rule["verbs"])


def test_each_tenants_jobs_are_applied_as_its_own_account() -> None:
    applied = list(manifests(TREE / "argocd")) + list(manifests(TREE / "flux"))
    paths = [m["spec"]["source"]["path"] for m in applied if m["kind"] == "Application"]
    paths += [m["spec"]["path"] for m in applied if m["apiVersion"].startswith("kustomize.toolkit")]
    assert len(paths) == 10
    assert all((ROOT / path / "kustomization.yaml").exists() for path in paths)
    projects = {m["metadata"]["name"]: m["spec"] for m in applied if m["kind"] == "AppProject"}
    for tenant in TENANTS:
        project = projects[tenant]
        assert [d["namespace"] for d in project["destinations"]] == [tenant]
        assert project["clusterResourceWhitelist"] == []
        assert [a["defaultServiceAccount"] for a in project["destinationServiceAccounts"]] == ["deployer"]
        (flux,) = (m for m in applied if "toolkit" in m["apiVersion"] and m["metadata"]["name"] == f"{tenant}-jobs")
        assert (flux["metadata"]["namespace"], flux["spec"]["serviceAccountName"]) == (tenant, "deployer")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl")
def test_kustomize_gives_each_tenant_its_own() -> None:
    for folder in ("operator", "profiles", "argocd", *(f"jobs/{tenant}" for tenant in TENANTS)):
        subprocess.run(["kubectl", "kustomize", str(TREE / folder)], capture_output=True, check=True)
    command = ["kubectl", "kustomize", str(TREE / "tenants")]
    built = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [document for document in yaml.load_all(built.stdout, LOADER) if document]
    assert [d["metadata"]["name"] for d in found if d["kind"] == "Namespace"] == list(TENANTS)
    for binding in (d for d in found if d["kind"] == "RoleBinding"):
        group, account = binding["subjects"]
        assert group["name"] == account["namespace"] == binding["metadata"]["namespace"]


# How a job is, by what the operator writes.


@cache
def _argo(kind: str) -> Any:
    (config,) = documents(TREE / "argocd" / "argocd-cm.yaml")
    runtime = lua.LuaRuntime(unpack_returned_tuples=True)
    script = config["data"][f"resource.customizations.health.finetune.dev_{kind}"]
    return runtime, runtime.eval(f"function(obj) {script} end")


def argo(obj: Object) -> tuple[str, str]:
    """Health and message, as Argo CD's script says."""
    runtime, check = _argo(obj["kind"])
    found = check(runtime.table_from(obj, recursive=True))
    return found["status"], found["message"]


def kstatus(obj: Object) -> str:
    """By the rules of kstatus for kinds that it does not know (sigs.k8s.io/cli-utils, pkg/kstatus/status)."""
    status = obj.get("status") or {}
    if "deletionTimestamp" in obj["metadata"]:
        return "Terminating"
    if "observedGeneration" in status and status["observedGeneration"] != obj["metadata"]["generation"]:
        return "InProgress"
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions") or ()}
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    return "InProgress" if conditions.get("Ready") in ("False", "Unknown") else "Current"


def seen(world: World) -> tuple[str, str]:
    return argo(world.job)[0], kstatus(world.job)


PROGRESSING, SUSPENDED = ("Progressing", "InProgress"), ("Suspended", "Current")


async def running() -> World:
    world = World(make_job().with_policy(maxAttempts=1).build())
    await world.settle()
    assert seen(world) == PROGRESSING
    world.prepared()
    await world.settle()
    assert seen(world) == PROGRESSING
    world.run("support-bot-0")
    await world.settle()
    assert world.state == "Running"
    assert seen(world) == PROGRESSING
    return world


async def test_a_job_that_completes_is_healthy() -> None:
    world = await running()
    world.end("support-bot-0", message=TerminationMessage(result=RESULT))
    world.finish("support-bot-0", "Complete")
    await world.settle()
    assert world.state == "Complete"
    assert seen(world) == ("Healthy", "Current")


async def test_a_job_that_fails_is_degraded_and_says_why() -> None:
    world = await running()
    world.fail("support-bot-0", Reason.DIVERGED, "the loss is not a number")
    await world.settle()
    assert world.state == "Failed"
    assert seen(world) == ("Degraded", "Failed")
    assert "the loss is not a number" in argo(world.job)[1]
    assert EXIT_CODES[Reason.DIVERGED]


async def test_a_job_that_is_suspended_holds_up_nobody() -> None:
    world = await running()
    world.set_policy(suspend=True)
    # Until the operator has seen it.
    assert seen(world) == PROGRESSING
    await world.settle()
    world.objects.clear()
    await world.settle()
    assert world.state == "Suspended"
    assert seen(world) == SUSPENDED


async def test_a_job_that_waits_for_its_profile_is_progressing_and_says_so() -> None:
    world = World(make_job().with_spec(profile="a100").build(), profiles=[])
    await world.settle()
    assert seen(world) == PROGRESSING
    assert "'a100' does not exist" in argo(world.job)[1]


def test_a_job_that_nobody_has_seen_is_progressing() -> None:
    assert argo(make_job().build())[0] == "Progressing"


async def test_a_job_that_is_deleted_is_terminating() -> None:
    world = await running()
    world.job["metadata"]["deletionTimestamp"] = datetime.datetime.now(datetime.UTC).isoformat()
    assert kstatus(world.job) == "Terminating"


def test_a_profile_is_healthy() -> None:
    assert argo({"kind": "FineTuneProfile", "metadata": {}})[0] == "Healthy"
