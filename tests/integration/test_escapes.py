"""The escape corpus against an API server that has the CRDs and nothing else: no operator, no webhook, no policy."""

import copy
from typing import Any

import pytest

from support import escapes
from support.api import Api
from support.escapes import ESCAPES, Escape
from support.manifests import job_manifest
from support.reporting import install_crds

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]
Object = dict[str, Any]


@pytest.fixture
async def jobs(api: Api, namespace: str) -> str:
    """The path of a namespace's FineTuneJobs."""
    await install_crds(api)
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"


def good(name: str = "good") -> Object:
    made = job_manifest(name, credentials={"secretRef": {"name": "s3"}})
    del made["metadata"]["namespace"]
    return made


def test_there_are_enough_of_them_and_no_two_are_the_same() -> None:
    assert len(ESCAPES) >= 60
    assert len({escape.name for escape in ESCAPES}) == len(ESCAPES)


async def test_none_that_the_schema_knows_is_admitted(api: Api, jobs: str) -> None:
    (await api.create(jobs, good(), fieldValidation="Strict", dryRun="All")).must(201)
    wrong = {}
    for escape in escapes.of("Schema", "Unknown"):
        answer = await api.create(jobs, escape.manifest(), fieldValidation="Strict")
        if answer.status not in (400, 413, 422, 500) or escape.words not in str(answer.body.get("message")):
            wrong[escape.name] = (answer.status, str(answer.body)[:300])
    assert wrong == {}
    assert await api.items(jobs) == []


async def test_a_field_that_does_not_exist_leaves_nothing_behind(api: Api, jobs: str) -> None:
    """Where a client asks for no validation of its fields, the server drops them: what is stored says nothing of it."""
    plain = Escape("plain", "Unknown", lambda manifest: None, "").manifest()
    known = (await api.create(jobs, plain, dryRun="All")).must(201)["spec"]
    for escape in escapes.of("Unknown"):
        stored = (await api.create(jobs, escape.manifest(), fieldValidation="Ignore", dryRun="All")).must(201)
        allowed = {"distribution", "output", "credentials"}
        assert stored["spec"].keys() <= known.keys() | allowed, escape.name
        assert escape.words.rsplit(".", 1)[-1] not in str(stored["spec"]), escape.name


async def test_none_that_changes_an_admitted_job_is_admitted(api: Api, jobs: str) -> None:
    kept = (await api.create(jobs, good())).must(201)
    wrong = {}
    for escape in escapes.of("Update"):
        changed = copy.deepcopy(kept)
        escape.change(changed)
        answer = await api.replace(f"{jobs}/good", changed)
        if answer.status != 422 or escape.words not in answer.body["message"]:
            wrong[escape.name] = (answer.status, str(answer.body)[:300])
    assert wrong == {}
    assert (await api.get(f"{jobs}/good")).must(200)["spec"] == kept["spec"]


async def test_what_a_tenant_says_of_the_status_is_not_kept(api: Api, jobs: str) -> None:
    forged = good() | {"status": {"state": "Complete", "result": {"uri": "s3://adapters/team-b/"}}}
    made = (await api.create(jobs, forged)).must(201)
    assert "status" not in made
    again = made | {"status": {"state": "Complete"}}
    assert "status" not in (await api.replace(f"{jobs}/good", again)).must(200)
