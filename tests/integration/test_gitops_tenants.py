"""What examples/gitops gives a tenant, on an API server with the chart's policies: its jobs, and nothing else."""

from typing import Any

import pytest
import yaml

from support import admitting
from support.admitting import RBAC, registered
from support.api import Api, Object
from support.charting import LOADER, ROOT
from support.operating import GROUP
from support.reporting import install_crds
from support.rights import token_of
from support.waiting import eventually

pytestmark = pytest.mark.integration
TREE = ROOT / "examples" / "gitops"


async def tenant(api: Api, namespace: str) -> str:
    """The rights of tenants/base; the token of its deployer."""
    for manifest in yaml.load_all((TREE / "tenants/base/rbac.yaml").read_text(), LOADER):
        if manifest["kind"] == "RoleBinding":
            # As kustomize does it for a ServiceAccount of the same tree.
            manifest["subjects"][1]["namespace"] = namespace
        base = "/api/v1" if manifest["apiVersion"] == "v1" else RBAC
        path = f"{base}/namespaces/{namespace}/{manifest['kind'].lower()}s"
        (await api.create(path, manifest)).must(201)
    return await token_of(api, namespace, "deployer")


async def test_a_tenants_account_makes_its_own_jobs_and_nothing_else(api: Api, namespace: str) -> None:
    await install_crds(api)
    token = await tenant(api, namespace)
    (job,) = yaml.load_all((TREE / "jobs/team-a/support-bot.yaml").read_text(), LOADER)
    jobs = f"{GROUP}/namespaces/{namespace}/finetunejobs"

    async def create(manifest: Object, where: str = jobs) -> Any:
        return await api.create(where, manifest, token=token, dryRun="All", fieldValidation="Strict")

    _, policies = admitting.policies(namespace)
    async with registered(api, policies):
        foreign = job | {"spec": job["spec"] | {"credentials": {"secretRef": {"name": "other"}}}}
        await eventually(lambda: create(foreign), "a refusal", until=lambda a: "may name only" in str(a.body))
        (await create(job)).must(201)
        (await api.create(jobs, job, token=token)).must(201)
        change = {"spec": {"runPolicy": {"suspend": True}}}
        (await api.patch(f"{jobs}/support-bot-1", change, token=token)).must(200)
        secrets = f"/api/v1/namespaces/{namespace}/secrets"
        status = {"status": {"state": "Complete"}}
        refused = {
            "read the keys": await api.get(f"{secrets}/s3-creds", token=token),
            "list Secrets": await api.get(secrets, token=token),
            "write a status": await api.patch(f"{jobs}/support-bot-1/status", status, token=token),
            "a job elsewhere": await create(job, f"{GROUP}/namespaces/default/finetunejobs"),
            "a profile": await api.get(f"{GROUP}/finetuneprofiles", token=token),
            "a pod": await api.create(f"/api/v1/namespaces/{namespace}/pods", {"metadata": {"name": "p"}}, token=token),
        }
        assert {what: answer.status for what, answer in refused.items()} == dict.fromkeys(refused, 403)
        (await api.delete(f"{jobs}/support-bot-1", token=token)).must(200)
