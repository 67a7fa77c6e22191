"""What our CRDs rely on: schemas, defaults, pruning, CEL, status, tables. The same tests pass on both API servers."""

import secrets
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_sandbox.up import Sandbox
from support.api import Api, Object
from support.process import run
from support.waiting import eventually
from support.widgets import CRDS, SPEC_SCHEMA, Widgets, define, definition

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def group() -> str:
    return f"{secrets.token_hex(4)}.example.com"


@pytest.fixture
async def widgets(api: Api, group: str, namespace: str) -> Widgets:
    """The definition is the module's, the namespace the test's."""
    return await define(api, group, namespace)


async def test_defaults_are_filled_in_and_unknown_fields_pruned(widgets: Widgets) -> None:
    made = await widgets.make(
        parts=[{"name": "a", "bogus": 1}], bogus=1, free={"any": {"thing": [1]}}, amount="5", settings={"k": "v"}
    )
    assert made["spec"] == {
        "size": 1,
        "mode": "Slow",
        "parts": [{"name": "a", "weight": 1.5}],
        "policy": {"attempts": 4},
        "free": {"any": {"thing": [1]}},
        "amount": "5",
        "settings": {"k": "v"},
    }
    assert (made["apiVersion"], made["kind"]) == (f"{widgets.group}/v1", "Widget")
    assert made["metadata"]["generation"] == 1
    assert (await widgets.api.get(widgets.path("w"))).must(200) == made


VALID: list[Object] = [
    {"size": 5, "ratio": 0.00002, "mode": "Fast", "tags": ["a", "b"]},
    {"uri": "s3://bucket", "amount": 5, "when": "2026-01-02T03:04:05Z", "maybe": None, "ratio": 3},
]


@pytest.mark.parametrize("spec", VALID)
async def test_what_the_schema_allows_is_accepted(widgets: Widgets, spec: Object) -> None:
    made = await widgets.make(**spec)
    assert {key: made["spec"].get(key) for key in spec} == spec


INVALID: list[tuple[Object, str, str]] = [
    ({"size": None}, "spec.size", ""),
    ({"size": "1"}, "spec.size", "must be of type integer"),
    ({"size": 1.5}, "spec.size", "must be of type integer"),
    ({"size": 0}, "spec.size", "should be greater than or equal to 1"),
    ({"size": 11}, "spec.size", "should be less than or equal to 10"),
    ({"ratio": 0}, "spec.ratio", "should be greater than 0"),
    ({"mode": "Medium"}, "spec.mode", 'supported values: "Fast", "Slow"'),
    ({"uri": "http://x"}, "spec.uri", "should match '^s3://'"),
    ({"uri": "s3://" + "x" * 20}, "spec.uri", "may not be more than 20"),
    ({"tags": ["a", "b", "c"]}, "spec.tags", "must have at most 2 items"),
    ({"tags": ["a", "a"]}, "spec.tags[1]", "Duplicate value"),
    ({"parts": [{"name": "a"}, {"name": "a"}]}, "spec.parts[1]", "Duplicate value"),
    ({"parts": [{"weight": 1}]}, "spec.parts[0].name", "Required value"),
    ({"settings": {"a": 1}}, "spec.settings.a", "must be of type string"),
    ({"amount": 1.5}, "spec.amount", ""),
    ({"when": "yesterday"}, "spec.when", "date-time"),
    ({"tags": ["UP"]}, "spec", "tags are lower case"),
    ({"mode": "Fast", "size": 8}, "spec.size", "Fast takes at most 5, far less"),
]


@pytest.mark.parametrize(("spec", "field", "words"), INVALID, ids=[str(spec)[:40] for spec, _, _ in INVALID])
async def test_what_the_schema_forbids_is_refused_by_field(
    widgets: Widgets, spec: Object, field: str, words: str
) -> None:
    answer = await widgets.api.create(widgets.path(), widgets.body(**spec))
    message = answer.refused(422, "Invalid")
    assert field in message
    assert words in message
    assert field in {cause["field"] for cause in answer.body["details"]["causes"]}
    assert (await widgets.api.get(widgets.path("w"))).status == 404


async def test_every_violation_is_reported_at_once(widgets: Widgets) -> None:
    spec: Object = {"size": 0, "mode": "Medium", "parts": [{"name": 5}]}
    causes = (await widgets.api.create(widgets.path(), widgets.body(**spec))).must(422)["details"]["causes"]
    assert {"spec.size", "spec.mode", "spec.parts[0].name"} <= {cause["field"] for cause in causes}
    spec = {"size": 6, "mode": "Fast", "tags": ["UP"]}
    causes = (await widgets.api.create(widgets.path(), widgets.body(**spec))).must(422)["details"]["causes"]
    assert {"spec.size", "spec"} <= {cause["field"] for cause in causes}


async def test_transition_rules_hold_only_on_change(widgets: Widgets) -> None:
    api, path = widgets.api, widgets.path("w")
    await widgets.make(frozen="a")
    assert "frozen cannot be changed" in (await api.patch(path, {"spec": {"frozen": "b"}})).refused(422, "Invalid")
    (await api.patch(path, {"spec": {"size": 2, "uri": "s3://a"}})).must(200)
    for uri in ("s3://b", None):
        assert "uri stays once" in (await api.patch(path, {"spec": {"uri": uri}})).refused(422, "Invalid")
    (await api.patch(path, {"spec": {"frozen": None}})).must(200)


async def test_strict_validation_refuses_unknown_fields(widgets: Widgets) -> None:
    body = widgets.body(bogus=1, parts=[{"name": "a", "other": 2}])
    message = (await widgets.api.create(widgets.path(), body, fieldValidation="Strict")).refused(400, "BadRequest")
    assert 'unknown field "spec.bogus"' in message
    assert 'unknown field "spec.parts[0].other"' in message


async def test_status_is_a_world_of_its_own(widgets: Widgets) -> None:
    api, path, status = widgets.api, widgets.path("w"), widgets.path("w", "status")
    made = (await api.create(widgets.path(), {**widgets.body(), "status": {"phase": "Mine"}})).must(201)
    assert "status" not in made

    patched = (await api.patch(path, {"spec": {"size": 2}, "status": {"phase": "Mine"}})).must(200)
    assert "status" not in patched
    assert patched["metadata"]["generation"] == 2

    change = {"metadata": {"labels": {"a": "b"}}, "spec": {"size": 3}, "status": {"phase": "Theirs", "bogus": 1}}
    patched = (await api.patch(status, change)).must(200)
    assert patched["spec"]["size"] == 2
    assert patched["status"] == {"phase": "Theirs"}
    assert "labels" not in patched["metadata"]
    assert patched["metadata"]["generation"] == 2

    replaced = (await api.replace(path, {**patched, "status": {}, "spec": {"size": 4}})).must(200)
    assert replaced["status"] == {"phase": "Theirs"}
    assert replaced["metadata"]["generation"] == 3
    labelled = (await api.patch(path, {"metadata": {"labels": {"a": "b"}}})).must(200)
    assert labelled["metadata"]["generation"] == 3

    (await api.replace(status, {**replaced, "status": {"phase": "Late"}})).refused(409, "Conflict")
    assert "status.count" in (await api.patch(status, {"status": {"count": -1}})).refused(422, "Invalid")
    fresh = (await api.replace(status, {**labelled, "status": {"phase": "Last"}})).must(200)
    assert fresh["status"] == {"phase": "Last"}
    assert (await api.get(status)).must(200) == fresh


async def test_only_the_resource_version_guards_a_status(widgets: Widgets) -> None:
    made = (await widgets.make())["metadata"]
    patch = {"metadata": {"uid": "another"}, "status": {"phase": "Ready"}}
    written = (await widgets.api.patch(widgets.path("w", "status"), patch)).must(200)
    assert (written["metadata"]["uid"], written["status"]) == (made["uid"], {"phase": "Ready"})
    patch = {"metadata": {"resourceVersion": made["resourceVersion"]}, "status": {"phase": "Late"}}
    (await widgets.api.patch(widgets.path("w", "status"), patch)).refused(409, "Conflict")


async def test_json_and_apply_patches_but_no_strategic_ones(widgets: Widgets) -> None:
    api, path = widgets.api, widgets.path("w")
    made = (await api.patch(path, widgets.body(size=2), "apply", fieldManager="test")).must(201)
    assert made["spec"]["policy"] == {"attempts": 4}
    change = [{"op": "add", "path": "/spec/tags", "value": ["x"]}]
    assert (await api.patch(path, change, "json")).must(200)["spec"]["tags"] == ["x"]
    (await api.patch(path, {"spec": {"size": 3}}, "strategic")).refused(415, "UnsupportedMediaType")


async def test_a_watch_from_before_its_history_is_410(widgets: Widgets) -> None:
    await widgets.make()
    async with widgets.api.watch(widgets.path(), resourceVersion=1, timeoutSeconds=3) as watch:
        if watch.status == 200:
            event = (await watch.rest())[0]
            assert event["type"] == "ERROR"
            status = event["object"]
            assert (status["kind"], status["code"], status["reason"]) == ("Status", 410, "Expired")
        else:
            assert watch.status == 410


async def test_children_of_a_custom_object_are_collected(widgets: Widgets) -> None:
    api = widgets.api
    owner = await widgets.make()
    reference = {"apiVersion": owner["apiVersion"], "kind": "Widget", "name": "w", "uid": owner["metadata"]["uid"]}
    metadata = {"name": "child", "ownerReferences": [{**reference, "controller": True, "blockOwnerDeletion": True}]}
    path = f"/api/v1/namespaces/{widgets.namespace}/configmaps"
    (await api.create(path, {"metadata": metadata})).must(201)
    (await api.delete(widgets.path("w"))).must(200)
    await eventually(
        lambda: api.get(f"{path}/child"), "collection of the child", until=lambda a: a.status == 404, timeout=45
    )


async def test_a_table_shows_the_printer_columns(widgets: Widgets) -> None:
    await widgets.make(size=7)
    status = {"status": {"phase": "Up", "conditions": [{"type": "Ready", "status": "True"}]}}
    (await widgets.api.patch(widgets.path("w", "status"), status)).must(200)
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    for path in (widgets.path(), widgets.path("w")):
        table = (await widgets.api.call("GET", path, accept=accept)).must(200)
        assert (table["kind"], table["apiVersion"]) == ("Table", "meta.k8s.io/v1")
        columns = [(column["name"], column["type"], column["priority"]) for column in table["columnDefinitions"]]
        assert columns == [
            ("Name", "string", 0),
            ("Phase", "string", 0),
            ("Size", "integer", 0),
            ("Ready", "string", 1),
            ("Age", "date", 0),
        ]
        [row] = table["rows"]
        assert row["cells"][:4] == ["w", "Up", 7, "True"]
        assert row["cells"][4], "an age"
        assert row["object"]["kind"] == "PartialObjectMetadata"
        assert row["object"]["metadata"]["name"] == "w"


async def test_discovery_tells_what_is_served(widgets: Widgets) -> None:
    api = widgets.api
    assert (await api.get("/version")).must(200)["gitVersion"].startswith("v1.")
    assert "v1" in (await api.get("/api")).must(200)["versions"]
    groups = {group["name"]: group for group in (await api.get("/apis")).must(200)["groups"]}
    assert {"batch", "apiextensions.k8s.io", "authentication.k8s.io", "coordination.k8s.io", widgets.group} <= set(
        groups
    )
    assert groups[widgets.group]["preferredVersion"]["version"] == "v1"

    resources = {r["name"]: r for r in (await api.get(f"/apis/{widgets.group}/v1")).must(200)["resources"]}
    assert set(resources) == {"widgets", "widgets/status"}
    widget = resources["widgets"]
    assert (widget["kind"], widget["namespaced"], widget["singularName"]) == ("Widget", True, "widget")
    assert widget["shortNames"] == ["wd"]
    assert widget["categories"] == ["all", "things"]
    assert {"create", "delete", "get", "list", "patch", "update", "watch"} <= set(widget["verbs"])

    core = {r["name"]: r for r in (await api.get("/api/v1")).must(200)["resources"]}
    wanted = {"configmaps", "events", "namespaces", "nodes", "pods", "pods/log", "pods/status", "secrets", "services"}
    assert wanted | {"serviceaccounts", "serviceaccounts/token"} <= set(core)
    jobs = {r["name"] for r in (await api.get("/apis/batch/v1")).must(200)["resources"]}
    assert {"jobs", "jobs/status"} <= jobs


async def test_without_its_definition_a_kind_is_gone(api: Api, namespace: str) -> None:
    widgets = await define(api, f"{secrets.token_hex(4)}.example.com", namespace)
    await widgets.make()
    (await api.delete(f"{CRDS}/widgets.{widgets.group}")).must(200)
    await eventually(lambda: api.get(widgets.path()), "404", until=lambda answer: answer.status == 404)


def broken(**changes: Any) -> Object:
    schema = deepcopy(SPEC_SCHEMA)
    schema["properties"].update(changes.pop("properties", {}))
    schema.update(changes)
    return schema


BAD_SCHEMAS = {
    "not structural": (broken(properties={"x": {}}), "type"),
    # A schema without free-form parts: with them the sandbox cannot tell, and finds out when the rule runs.
    "rule names no field": (
        {
            "type": "object",
            "properties": {"size": {"type": "integer"}},
            "x-kubernetes-validations": [{"rule": "self.nope > 1"}],
        },
        "undefined field",
    ),
    "rule does not parse": (broken(**{"x-kubernetes-validations": [{"rule": "self.size >"}]}), "compilation failed"),
    "rule is no condition": (broken(**{"x-kubernetes-validations": [{"rule": "self.size"}]}), "bool"),
    "default breaks the schema": (broken(properties={"x": {"type": "integer", "default": "1"}}), "default"),
    "map key is no field": (
        broken(
            properties={
                "x": {
                    "type": "array",
                    "x-kubernetes-list-type": "map",
                    "x-kubernetes-list-map-keys": ["id"],
                    "items": {"type": "object", "properties": {"name": {"type": "string"}}},
                }
            }
        ),
        "id",
    ),
}


@pytest.mark.parametrize("case", BAD_SCHEMAS)
async def test_a_bad_definition_is_refused(api: Api, case: str) -> None:
    schema, words = BAD_SCHEMAS[case]
    group = f"{secrets.token_hex(4)}.example.com"
    message = (await api.create(CRDS, definition(group, schema))).refused(422, "Invalid")
    assert words in message


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
async def test_kubectl_applies_gets_and_explains(cluster: Sandbox, widgets: Widgets, tmp_path: Path) -> None:
    kubectl = [
        "kubectl",
        "--kubeconfig",
        str(cluster.kubeconfig),
        "--cache-dir",
        str(tmp_path),
        "-n",
        widgets.namespace,
    ]
    manifest = tmp_path / "widget.yaml"
    for size, words in ((3, "created"), (4, "configured"), (4, "unchanged")):
        manifest.write_text(yaml.safe_dump(widgets.body(size=size)))
        assert words in await run(*kubectl, "apply", "-f", str(manifest))
    lines = (await run(*kubectl, "get", "widgets")).splitlines()
    assert lines[0].split() == ["NAME", "PHASE", "SIZE", "AGE"]
    assert lines[1].split()[:2] == ["w", "4"]
    assert "size" in await run(*kubectl, "explain", f"widgets.{widgets.group}.spec")
    assert "deleted" in await run(*kubectl, "delete", "-f", str(manifest))
