"""The generated CRDs: what architecture and API conventions ask of every field, and that the files are current."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.crd import crds, job_crd, structural
from finetune_api.job import FineTuneJob, FineTuneJobSpec
from finetune_api.jobstatus import FineTuneJobStatus

ROOT = Path(__file__).parents[2]
Schema = dict[str, Any]


def schema_of(crd: dict[str, Any]) -> Schema:
    schema: Schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


ALL = [(crd["spec"]["names"]["kind"] + path, node) for crd in crds() for path, node in nodes(schema_of(crd))]


@pytest.mark.parametrize("crd", crds(), ids=lambda crd: crd["metadata"]["name"])
def test_the_files_are_what_the_models_say(crd: dict[str, Any]) -> None:
    assert yaml.safe_load((ROOT / "crds" / f"{crd['metadata']['name']}.yaml").read_text()) == crd


def test_every_string_and_list_of_spec_is_bounded() -> None:
    loose = [
        path
        for path, node in ALL
        if (
            (node.get("type") == "string" and not {"maxLength", "enum", "format"} & node.keys())
            or (node.get("type") == "array" and "maxItems" not in node)
        )
        and ".spec" in path
    ]
    assert loose == []


def test_every_count_has_a_minimum() -> None:
    loose = [
        path
        for path, node in ALL
        if node.get("type") in ("integer", "number")
        and "minimum" not in node
        and ".spec" in path
        and not path.endswith((".value", ".tolerationSeconds"))
    ]
    assert loose == []


def test_only_keywords_of_structural_schemas() -> None:
    allowed = {
        *(
            "type",
            "properties",
            "items",
            "additionalProperties",
            "required",
            "enum",
            "format",
            "pattern",
            "description",
        ),
        *("default", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength"),
        *("minItems", "maxItems", "minProperties", "maxProperties", "x-kubernetes-validations"),
        *("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-preserve-unknown-fields"),
    }
    assert {key for _, node in ALL for key in node} <= allowed
    assert all("type" in node for _, node in ALL)


def test_every_rule_has_a_message_and_holds_without_defaults() -> None:
    rules = [(path, rule) for path, node in ALL for rule in node.get("x-kubernetes-validations", ())]
    assert len(rules) > 30
    assert all(rule["message"] for _, rule in rules)


def test_every_field_of_spec_is_immutable_but_the_named_ones() -> None:
    rules = schema_of(job_crd())["properties"]["spec"]["x-kubernetes-validations"]
    frozen = {rule["fieldPath"] for rule in rules if "oldSelf" in rule["rule"]}
    spec = schema_of(job_crd())["properties"]["spec"]["properties"]
    expected = {f".{name}" for name in spec if name not in FineTuneJobSpec.mutable} | {
        f".{name}.{member}"
        for name, mutable in FineTuneJobSpec.mutable.items()
        for member in spec[name]["properties"]
        if member not in mutable
    }
    assert frozen == expected


def test_a_status_has_no_defaults() -> None:
    status = structural(FineTuneJob)["properties"]["status"]
    assert [path for path, node in nodes(status) if "default" in node] == []
    assert set(status["properties"]) == {field.alias or name for name, field in FineTuneJobStatus.model_fields.items()}


def test_printer_columns_read_fields_that_exist() -> None:
    known = {path.removesuffix("[]") for path, _ in nodes(schema_of(job_crd()))} | {".metadata.creationTimestamp"}
    columns = job_crd()["spec"]["versions"][0]["additionalPrinterColumns"]
    assert {c["jsonPath"].split("[?")[0] for c in columns} <= known
    assert [c["name"] for c in columns if "priority" not in c] == ["State", "Progress", "ETA", "Attempts", "Age"]
    assert [c["name"] for c in columns if "priority" in c] == ["Stage", "Loss", "Queue", "GPUs", "Message"]
