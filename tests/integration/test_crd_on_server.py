"""The API server, through the CRD, and the models refuse the same manifests: neither alone decides."""

from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from finetune_api import job
from finetune_api.crd import crds
from support.api import Api
from support.manifests import job_manifest
from support.waiting import eventually

pytestmark = pytest.mark.integration
LIMIT = "x" * 300
GOOD: dict[str, dict[str, Any]] = {
    "minimal": {},
    "max steps": {"training": {"maxSteps": 5, "learningRate": 1e-6}},
    "half an epoch": {"training": {"epochs": 0.5}},
    "lora": {"tuning": {"type": "LoRA", "lora": {"rank": 8, "alpha": 16, "targetModules": ["q_proj", "v_proj"]}}},
    "qlora is lora": {"tuning": {"type": "QLoRA", "lora": {"rank": 8}}},
    "dpo": {"method": {"type": "DPO", "dpo": {"beta": 0.2}}},
    "secret": {"credentials": {"secretRef": {"name": "s3-creds"}}},
    "service account": {"credentials": {"serviceAccountName": "tuner"}},
    "steps": {"checkpoint": {"interval": {"type": "Steps", "steps": 10}}},
    "validation": {"validation": {"fraction": 0.1}},
    "a stage": {"stages": [{"name": "one", "training": {"epochs": 1}}]},
    "hf": {"baseModel": {"uri": "hf://org/name@main"}},
    "a mix by temperature": {"mixing": {"type": "Temperature", "temperature": 2}},
    "a mix by size": {"mixing": {"type": "Proportional"}},
    "passages and shots": {
        "datasets": [
            {
                "name": "a",
                "uri": "s3://data/a",
                "columns": {"context": "found"},
                "retrieval": {"dropRatio": 0.5, "swapRatio": 0.5},
                "shots": 3,
            }
        ]
    },
    "passages that are never dropped": {
        "datasets": [{"name": "a", "uri": "s3://data/a", "columns": {"context": "found"}, "retrieval": {}}]
    },
    "a template": {
        "datasets": [{"name": "a", "uri": "s3://data/a", "template": "{% if b %}{{ b }}{% endif %} {{ c }}"}]
    },
    "a reward": {
        "method": {"type": "GRPO", "grpo": {"rewards": [{"name": "a", "expression": "words(completion) < 100"}]}}
    },
    "a similarity": {"dataPolicy": {"similarity": 0.75}},
    "as few as all": {"distribution": {"workers": 2, "minWorkers": 2}},
}
BAD: dict[str, dict[str, Any]] = {
    "epochs and maxSteps": {"training": {"epochs": 1, "maxSteps": 1}},
    "no epochs": {"training": {"epochs": 0}},
    "negative workers": {"distribution": {"workers": -1}},
    "more workers at the least": {"distribution": {"workers": 2, "minWorkers": 3}},
    "two workers at the least of one": {"distribution": {"minWorkers": 2}},
    "no workers at the least": {"distribution": {"workers": 2, "minWorkers": 0}},
    "workers as text": {"distribution": {"workers": "two"}},
    "ia3 under LoRA": {"tuning": {"type": "LoRA", "ia3": {}}},
    "dpo under SFT": {"method": {"type": "SFT", "dpo": {}}},
    "unknown method": {"method": {"type": "XYZ"}},
    "dots in a key": {"baseModel": {"uri": "s3://models/a/../b"}},
    "not a URI": {"output": {"uri": "/tmp/out"}},
    "http": {"output": {"uri": "https://bucket/out"}},
    "bucket in capitals": {"output": {"uri": "s3://Bucket/out"}},
    "no datasets": {"datasets": []},
    "two datasets of one name": {
        "datasets": [{"name": "a", "uri": "s3://data/a"}, {"name": "a", "uri": "s3://data/b"}]
    },
    "both credentials": {"credentials": {"secretRef": {"name": "a"}, "serviceAccountName": "b"}},
    "no credentials": {"credentials": {}},
    "steps without a number": {"checkpoint": {"interval": {"type": "Steps"}}},
    "seconds under Steps": {"checkpoint": {"interval": {"type": "Steps", "steps": 1, "seconds": 1}}},
    "steps under Auto": {"checkpoint": {"interval": {"type": "Auto", "steps": 1}}},
    "fraction too large": {"validation": {"fraction": 0.9}},
    "holdout of nothing": {"validation": {}},
    "learning rate 0": {"training": {"learningRate": 0}},
    "dropout 1": {"tuning": {"type": "LoRA", "lora": {"dropout": 1}}},
    "a stage's union": {"stages": [{"name": "one", "tuning": {"type": "Full", "lora": {}}}]},
    "too long a name": {"profile": LIMIT},
    "too many gates": {"evaluation": {"gates": [{"metric": "a", "operator": "AtLeast", "value": 1}] * 33}},
    "a mix without its temperature": {"mixing": {"type": "Temperature"}},
    "a temperature under Weighted": {"mixing": {"type": "Weighted", "temperature": 2}},
    "a mix of no kind": {"mixing": {}},
    "retrieval without a column": {"datasets": [{"name": "a", "uri": "s3://data/a", "retrieval": {"dropRatio": 0.5}}]},
    "more than all rows": {
        "datasets": [
            {
                "name": "a",
                "uri": "s3://data/a",
                "columns": {"context": "found"},
                "retrieval": {"dropRatio": 0.6, "swapRatio": 0.6},
            }
        ]
    },
    "too many shots": {"datasets": [{"name": "a", "uri": "s3://data/a", "shots": 65}]},
    "a similarity of anything": {"dataPolicy": {"similarity": 0.1}},
    "managed by a stranger": {"runPolicy": {"managedBy": "someone"}},
}
PATH = "/apis/finetune.dev/v1alpha1"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


def manifest_of(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A manifest that takes the namespace of the path it is sent to."""
    manifest = job_manifest(name=name, **changes)
    del manifest["metadata"]["namespace"]
    return manifest


async def put_crd(api: Api, crd: dict[str, Any]) -> None:
    answer = await api.patch(f"{CRDS}/{crd['metadata']['name']}", crd, "apply", fieldManager="test", force="true")
    assert answer.status in (200, 201), answer.body


@pytest.fixture
async def jobs(api: Api, namespace: str) -> str:
    """The path of a namespace's FineTuneJobs, on a server that has the CRDs."""
    for crd in crds():
        await put_crd(api, crd)
    path = f"{PATH}/namespaces/{namespace}/finetunejobs"
    await eventually(lambda: api.get(path), "FineTuneJobs to be served", until=lambda answer: answer.status == 200)
    return path


def model_accepts(manifest: dict[str, Any]) -> bool:
    try:
        job.parse(manifest)
    except pydantic.ValidationError:
        return False
    return True


async def test_both_accept_what_is_good(api: Api, jobs: str) -> None:
    for name, changes in GOOD.items():
        manifest = manifest_of("good", changes)
        answer = await api.create(jobs, manifest, dryRun="All")
        assert answer.status == 201, (name, answer.body)
        assert model_accepts(manifest), name
        # What the server adds by default is what the model assumes: the same spec after a round trip.
        assert job.parse(answer.body).spec == job.parse(manifest).spec, name


async def test_both_refuse_what_is_bad(api: Api, jobs: str) -> None:
    for name, changes in BAD.items():
        manifest = manifest_of("bad", changes)
        answer = await api.create(jobs, manifest, dryRun="All")
        assert answer.status == 422, (name, answer.body)
        # Duplicate keys of a list-map are the server's own rule; the model leaves them to it.
        assert not model_accepts(manifest) or "two datasets" in name, name


async def test_unknown_fields_are_refused_where_that_is_asked_for_and_pruned_elsewhere(api: Api, jobs: str) -> None:
    manifest = manifest_of("extra", {"foo": 1})
    strict = await api.create(jobs, manifest, fieldValidation="Strict", dryRun="All")
    assert "spec.foo" in strict.refused(400, "BadRequest")
    assert "foo" not in (await api.create(jobs, manifest)).must(201)["spec"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"runPolicy": {"suspend": True}}, 200),
        ({"runPolicy": {"ttlSecondsAfterFinished": 5}}, 200),
        ({"runPolicy": {"activeDeadlineSeconds": 50}}, 200),
        ({"queue": {"priorityClassName": "high"}}, 200),
        ({"queue": {"name": "other"}}, 422),
        ({"runPolicy": {"maxAttempts": 9}}, 422),
        ({"training": {"learningRate": 0.5}}, 422),
        ({"profile": "other"}, 422),
        ({"validation": {"fraction": 0.2}}, 422),
        ({"output": {"uri": "s3://elsewhere/"}}, 422),
    ],
)
async def test_only_what_is_named_may_change(api: Api, jobs: str, change: dict[str, Any], status: int) -> None:
    (await api.create(jobs, manifest_of("support-bot", {}))).must(201)
    answer = await api.patch(f"{jobs}/support-bot", {"spec": change})
    assert answer.status == status, answer.body
    if status == 422:
        assert "cannot be changed" in answer.body["message"]


async def test_names_longer_than_their_children_allow_are_refused(api: Api, jobs: str) -> None:
    message = (await api.create(jobs, manifest_of("a" * 51, {}))).refused(422, "Invalid")
    assert "metadata.name" in message


async def test_the_files_in_the_repository_are_accepted(api: Api) -> None:
    for file in (Path(__file__).parents[2] / "crds").glob("*.yaml"):
        crd = yaml.safe_load(file.read_text())
        await put_crd(api, crd)
        path = f"{CRDS}/{crd['metadata']['name']}"
        seen = await eventually(
            partial(api.get, path), "conditions", until=lambda a: a.body.get("status", {}).get("conditions")
        )
        # NonStructuralSchema appears only where the schema is not structural.
        assert "NonStructuralSchema" not in {c["type"] for c in seen.body["status"]["conditions"]}
