"""Structural schemas: pruning, defaults, validation, ratcheting; and which CRDs are refused."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_sandbox import custom, schema

SPEC: dict[str, Any] = {
    "type": "object",
    "required": ["size"],
    "properties": {
        "size": {"type": "integer", "minimum": 1, "maximum": 9, "format": "int32"},
        "ratio": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        "mode": {"type": "string", "enum": ["Fast", "Slow"], "default": "Slow"},
        "uri": {"type": "string", "minLength": 5, "maxLength": 9, "pattern": "^s3:/"},
        "tags": {"type": "array", "maxItems": 2, "x-kubernetes-list-type": "set", "items": {"type": "string"}},
        "parts": {
            "type": "array",
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "n": {"type": "integer", "default": 3, "maximum": 5}},
            },
        },
        "policy": {"type": "object", "default": {}, "properties": {"tries": {"type": "integer", "default": 4}}},
        "settings": {"type": "object", "maxProperties": 1, "additionalProperties": {"type": "string"}},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "amount": {"x-kubernetes-int-or-string": True},
        "when": {"type": "string", "format": "date-time"},
        "maybe": {"type": "string", "nullable": True},
        "one": {"type": "integer", "oneOf": [{"minimum": 5}, {"maximum": 2}], "not": {"enum": [7]}},
    },
}
ROOT = {"type": "object", "properties": {"spec": SPEC}}


def made(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "x/v1", "kind": "X", "metadata": {"name": "x"}, "spec": spec}


def test_unknown_fields_are_pruned_and_named() -> None:
    obj = made(
        size=1, junk=1, free={"any": 1}, settings={"k": "v"}, parts=[{"name": "a", "junk": 2}], maybe=None, uri=None
    )
    obj["other"] = 1
    assert sorted(schema.prune(ROOT, obj)) == ["other", "spec.junk", "spec.parts[0].junk"]
    kept = {"size": 1, "free": {"any": 1}, "settings": {"k": "v"}, "parts": [{"name": "a"}], "maybe": None}
    assert obj["spec"] == kept, "a null stays only where it is allowed"


def test_defaults_are_filled_in_at_every_depth() -> None:
    obj = made(size=1, parts=[{"name": "a"}])
    schema.default(ROOT, obj)
    assert obj["spec"] == {"size": 1, "mode": "Slow", "policy": {"tries": 4}, "parts": [{"name": "a", "n": 3}]}
    obj["spec"]["policy"]["tries"] = 9
    other = made(size=1)
    schema.default(ROOT, other)
    assert other["spec"]["policy"] == {"tries": 4}, "defaults are not shared between objects"


VALID: list[dict[str, Any]] = [
    {"size": 1, "ratio": 2e-5, "uri": "s3://a", "amount": "5", "when": "2026-01-02T03:04:05Z", "maybe": None},
    {"size": 9.0, "ratio": 1, "amount": 5, "tags": ["a", "b"], "parts": [{"name": "a"}, {"name": "b"}], "one": 6},
]


@pytest.mark.parametrize("spec", VALID)
def test_valid(spec: dict[str, Any]) -> None:
    assert schema.validate(ROOT, made(**spec)) == []


INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({}, "spec.size", "Required value"),
    ({"size": 0}, "spec.size", "Invalid value: 0: spec.size in body should be greater than or equal to 1"),
    ({"size": 10}, "spec.size", "should be less than or equal to 9"),
    ({"size": "1"}, "spec.size", 'Invalid value: "string": spec.size in body must be of type integer: "string"'),
    ({"size": True}, "spec.size", "must be of type integer"),
    ({"size": 1.5}, "spec.size", "must be of type integer"),
    ({"size": 1, "ratio": 0}, "spec.ratio", "should be greater than 0"),
    ({"size": 1, "mode": "X"}, "spec.mode", 'Unsupported value: "X": supported values: "Fast", "Slow"'),
    ({"size": 1, "uri": "s3:/"}, "spec.uri", "should be at least 5 chars long"),
    ({"size": 1, "uri": "s3://012345"}, "spec.uri", "Too long: may not be more than 9 bytes"),
    ({"size": 1, "uri": "http:"}, "spec.uri", "should match '^s3:/'"),
    ({"size": 1, "tags": ["a", "b", "c"]}, "spec.tags", "Too many: 3: must have at most 2 items"),
    ({"size": 1, "tags": ["a", "a"]}, "spec.tags[1]", 'Duplicate value: "a"'),
    ({"size": 1, "parts": [{"name": "a"}, {"name": "a"}]}, "spec.parts[1]", 'Duplicate value: {"name":"a"}'),
    ({"size": 1, "parts": [{"n": 1}]}, "spec.parts[0].name", "Required value"),
    ({"size": 1, "settings": {"a": 1}}, "spec.settings.a", "must be of type string"),
    ({"size": 1, "settings": {"a": "", "b": ""}}, "spec.settings", "Too many: 2"),
    ({"size": 1, "amount": 1.5}, "spec.amount", "must be of type integer,string"),
    ({"size": 1, "when": "yesterday"}, "spec.when", "must be of type date-time"),
    ({"size": 1, "one": 3}, "spec.one", "Found none valid"),
    ({"size": 1, "one": 7}, "spec.one", "must not validate the schema (not)"),
]


@pytest.mark.parametrize(("spec", "field", "words"), INVALID)
def test_invalid(spec: dict[str, Any], field: str, words: str) -> None:
    [cause] = schema.validate(ROOT, made(**spec))
    assert cause.field == field
    assert words in cause.message


def test_what_did_not_change_is_not_validated_again() -> None:
    old = made(size=99, parts=[{"name": "a", "n": 99}])
    assert schema.validate(ROOT, made(size=99, parts=[{"name": "b"}, {"name": "a", "n": 99}]), old) == []
    assert [c.field for c in schema.validate(ROOT, made(size=98), old)] == ["spec.size"]


@pytest.mark.parametrize(
    ("regex", "text", "found"),
    [("^a$", "a\n", False), ("^a$", "a", True), ("[$]", "$", True), (r"\$", "$", True), (r"^a\z", "a", True)],
)
def test_a_pattern_means_what_it_means_in_go(regex: str, text: str, found: bool) -> None:
    assert bool(schema.pattern(regex).search(text)) is found


def crd(spec: dict[str, Any], **version: Any) -> dict[str, Any]:
    body = {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}
    versions = [{"name": "v1", "served": True, "storage": True, "schema": body} | version]
    names = {"plural": "xs", "kind": "X"}
    definition: dict[str, Any] = {
        "metadata": {"name": "xs.example.com"},
        "spec": {"group": "example.com", "scope": "Namespaced", "names": names},
    }
    definition["spec"]["versions"] = versions
    custom.default(definition)
    return definition


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"properties": {"a": {"type": "string"}}}, "type"),
    ({"type": "object", "properties": {"a": {"type": "array"}}}, "items"),
    ({"type": "text"}, "type"),
    ({"type": "object", "$ref": "#/x"}, "$ref"),
    ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, "pattern"),
    ({"type": "object", "properties": {"a": {"type": "integer", "default": "x"}}}, "default"),
    ({"type": "array", "items": {"type": "object"}, "x-kubernetes-list-type": "map"}, "x-kubernetes-list-map-keys"),
    ({"type": "object", "x-kubernetes-validations": [{"rule": "self.a >"}]}, "rule"),
    ({"type": "object", "x-kubernetes-validations": [{"rule": "self.nope > 1"}]}, "undefined field 'nope'"),
    ({"type": "object", "x-kubernetes-validations": [{"rule": "1"}]}, "must evaluate to a bool"),
    ({"type": "string", "x-kubernetes-validations": [{"rule": "isURL(self)"}]}, "undeclared reference to isURL"),
]


@pytest.mark.parametrize(("spec", "words"), REFUSED)
def test_a_crd_that_is_not_structural_is_refused(spec: dict[str, Any], words: str) -> None:
    causes = custom.validate(crd(spec), None)
    assert any(words in f"{c.field} {c.message}" for c in causes), causes


def test_what_the_sandbox_cannot_serve_is_refused() -> None:
    causes = custom.validate(crd({"type": "object"}, subresources={"scale": {"specReplicasPath": ".spec.n"}}), None)
    assert [c.field for c in causes] == ["spec.versions[0].subresources.scale"]
    hooked = crd({"type": "object"})
    hooked["spec"]["conversion"] = {"strategy": "Webhook"}
    assert [c.field for c in custom.validate(hooked, None)] == ["spec.conversion.strategy"]
