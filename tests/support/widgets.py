"""A small CRD with one field for each thing that a schema can say, and objects of it."""

from dataclasses import dataclass
from typing import Any

from support.api import Api, Object
from support.waiting import eventually

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"

SPEC_SCHEMA: Object = {
    "type": "object",
    "required": ["size"],
    "properties": {
        "size": {"type": "integer", "minimum": 1, "maximum": 10},
        "ratio": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        "mode": {"type": "string", "enum": ["Fast", "Slow"], "default": "Slow"},
        "uri": {"type": "string", "maxLength": 20, "pattern": "^s3://"},
        "tags": {
            "type": "array",
            "maxItems": 2,
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "maxLength": 9},
        },
        "parts": {
            "type": "array",
            "maxItems": 4,
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "maxLength": 9},
                    "weight": {"type": "number", "default": 1.5},
                },
            },
        },
        "policy": {
            "type": "object",
            "default": {},
            "properties": {"attempts": {"type": "integer", "default": 4, "minimum": 1}},
        },
        "settings": {"type": "object", "maxProperties": 4, "additionalProperties": {"type": "string"}},
        "amount": {"x-kubernetes-int-or-string": True},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "when": {"type": "string", "format": "date-time"},
        "maybe": {"type": "string", "nullable": True},
        "frozen": {
            "type": "string",
            "maxLength": 9,
            "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "frozen cannot be changed"}],
        },
    },
    "x-kubernetes-validations": [
        {"rule": "!has(self.tags) || self.tags.all(t, t.matches('^[a-z]+$'))", "message": "tags are lower case"},
        {
            "rule": "self.mode != 'Fast' || self.size <= 5",
            "messageExpression": "'Fast takes at most 5' + (self.size > 7 ? ', far less' : '')",
            "fieldPath": ".size",
            "reason": "FieldValueForbidden",
        },
        {
            "rule": "!has(oldSelf.uri) || (has(self.uri) && self.uri == oldSelf.uri)",
            "message": "uri stays once it is set",
        },
    ],
}

CONDITIONS_SCHEMA: Object = {
    "type": "array",
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["type"],
    "items": {
        "type": "object",
        "required": ["type", "status"],
        "properties": {"type": {"type": "string"}, "status": {"type": "string"}},
    },
}

STATUS_SCHEMA: Object = {
    "type": "object",
    "properties": {
        "phase": {"type": "string"},
        "count": {"type": "integer", "minimum": 0},
        "conditions": CONDITIONS_SCHEMA,
    },
}

COLUMNS = [
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
    {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status', "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]


def definition(group: str, schema: Object | None = None) -> Object:
    spec = schema or SPEC_SCHEMA
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec, "status": STATUS_SCHEMA}}},
        "subresources": {"status": {}},
        "additionalPrinterColumns": COLUMNS,
    }
    kinds = {"plural": "widgets", "singular": "widget", "kind": "Widget", "listKind": "WidgetList"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"widgets.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {**kinds, "shortNames": ["wd"], "categories": ["all", "things"]},
            "versions": [version],
        },
    }


@dataclass(frozen=True)
class Widgets:
    """A namespace with an established CRD of its own."""

    api: Api
    group: str
    namespace: str

    def path(self, name: str = "", subresource: str = "") -> str:
        parts = [f"/apis/{self.group}/v1/namespaces/{self.namespace}/widgets", name, subresource]
        return "/".join(part for part in parts if part)

    def body(self, name: str = "w", **spec: Any) -> Object:
        return {
            "apiVersion": f"{self.group}/v1",
            "kind": "Widget",
            "metadata": {"name": name},
            "spec": {"size": 1, **spec},
        }

    async def make(self, name: str = "w", **spec: Any) -> Object:
        made: Object = (await self.api.create(self.path(), self.body(name, **spec))).must(201)
        return made


async def established(api: Api, group: str) -> None:
    def ready(crd: Object) -> bool:
        conditions = {c["type"]: c["status"] for c in crd.get("status", {}).get("conditions") or []}
        return conditions.get("Established") == "True" and conditions.get("NamesAccepted") == "True"

    async def get() -> Object:
        crd: Object = (await api.get(f"{CRDS}/widgets.{group}")).must(200)
        return crd

    await eventually(get, "established CRD", until=ready)
    path = f"/apis/{group}/v1/widgets"
    await eventually(lambda: api.get(path), "served CRD", until=lambda answer: answer.status == 200)


async def define(api: Api, group: str, namespace: str) -> Widgets:
    assert (await api.create(CRDS, definition(group))).status in (201, 409)
    await established(api, group)
    return Widgets(api, group, namespace)
