"""CustomResourceDefinitions: is the schema structural, and what Resource does it make?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_sandbox import cel, meta, schema
from finetune_sandbox.errors import Cause, Obj, duplicate, not_allowed, not_supported, required, wrong
from finetune_sandbox.resources import Column, Resource
from finetune_sandbox.table import age, json_path

CLEANUP = "customresourcecleanup.apiextensions.k8s.io"
_BLOCKING = {
    "FieldValueRequired",
    "FieldValueTooLong",
    "FieldValueTooMany",
    "FieldValueTypeInvalid",
    "FieldValueNotSupported",
}
_TYPES = ("array", "boolean", "integer", "number", "object", "string")
_FORBIDDEN = ("$ref", "definitions", "dependencies", "patternProperties", "additionalItems", "id", "deprecated")
_VALUE_ONLY = (
    "type",
    "default",
    "additionalProperties",
    "nullable",
    "title",
    "description",
    "x-kubernetes-validations",
)


def default(crd: Obj) -> None:
    spec = crd.setdefault("spec", {})
    spec.setdefault("conversion", {"strategy": "None"})
    names = spec.setdefault("names", {})
    if isinstance(names.get("kind"), str):
        names.setdefault("singular", names["kind"].lower())
        names.setdefault("listKind", names["kind"] + "List")


def prepare(crd: Obj, old: Obj | None) -> None:
    if old is None:
        finalizers = crd["metadata"].setdefault("finalizers", [])
        if CLEANUP not in finalizers:
            finalizers.append(CLEANUP)
    if old is None or old["spec"].get("names") != crd["spec"].get("names"):
        was = {c["type"]: c for c in ((old or {}).get("status") or {}).get("conditions", ())}
        time = was.get("Established", {}).get("lastTransitionTime") or meta.now()
        crd["status"] = {
            "acceptedNames": crd["spec"]["names"],
            "storedVersions": [v.get("name") for v in _versions(crd) if v.get("storage")],
            "conditions": [
                _true("NamesAccepted", "NoConflicts", "no conflicts found", time),
                _true("Established", "InitialNamesAccepted", "the initial names have been accepted", time),
            ],
        }


def _true(kind: str, reason: str, message: str, time: str) -> Obj:
    return {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": time}


def _versions(crd: Obj) -> list[Obj]:
    return [v for v in crd["spec"].get("versions") or [] if isinstance(v, dict)]


def validate(crd: Obj, old: Obj | None) -> list[Cause]:
    """What is wrong with a CRD; one served version, no conversion and no scale are this server's own limits."""
    spec, names = crd["spec"], crd["spec"]["names"]
    found = [required(f"spec.{k}") for k in ("group", "scope") if not spec.get(k)]
    found += [required(f"spec.names.{k}") for k in ("plural", "kind") if not names.get(k)]
    if not _versions(crd):
        found.append(required("spec.versions"))
    if found:
        return found
    if crd["metadata"]["name"] != f"{names['plural']}.{spec['group']}":
        why = 'must be spec.names.plural+"."+spec.group'
        found.append(wrong("metadata.name", crd["metadata"]["name"], why))
    if spec["scope"] not in ("Cluster", "Namespaced"):
        found.append(not_supported("spec.scope", spec["scope"], ("Cluster", "Namespaced")))
    if spec["conversion"].get("strategy") != "None":
        found.append(wrong("spec.conversion.strategy", spec["conversion"].get("strategy"), "the sandbox has None only"))
    stored = sum(1 for v in _versions(crd) if v.get("storage"))
    if stored != 1:
        found.append(wrong("spec.versions", stored, "must have exactly one version marked as storage version"))
    served = [v for v in _versions(crd) if v.get("served")]
    if len(served) != 1 or not served[0].get("storage"):
        found.append(
            wrong("spec.versions", [v.get("name") for v in served], "the sandbox serves one version, the stored one")
        )
    if old is not None:
        for field in ("group", "scope"):
            if spec[field] != old["spec"][field]:
                found.append(wrong(f"spec.{field}", spec[field], "field is immutable"))
        if names.get("kind") != old["spec"]["names"].get("kind"):
            found.append(wrong("spec.names.kind", names.get("kind"), "field is immutable"))
    for i, version in enumerate(_versions(crd)):
        found += _version(version, f"spec.versions[{i}]", "spec.validation" if len(_versions(crd)) == 1 else "")
    return found


def _version(version: Obj, path: str, shared: str) -> list[Cause]:
    if (version.get("subresources") or {}).get("scale"):
        return [not_allowed(f"{path}.subresources.scale", "the sandbox does not serve scale")]
    for i, column in enumerate(version.get("additionalPrinterColumns") or ()):
        try:
            json_path(column["jsonPath"], column["type"])
        except (KeyError, ValueError) as error:
            return [wrong(f"{path}.additionalPrinterColumns[{i}].jsonPath", column.get("jsonPath", ""), str(error))]
    root = (version.get("schema") or {}).get("openAPIV3Schema")
    where = f"{shared or path + '.schema'}.openAPIV3Schema"
    if not isinstance(root, dict):
        return [required(f"{path}.schema.openAPIV3Schema", "schemas are required")]
    if root.get("type") != "object":
        return [wrong(f"{where}.type", root.get("type", ""), "must be object at the root")]
    found = _structural(root, where, root=True)
    if not found:
        cel.compile_rules(root, where, found)
        found += _defaults(root, where)
    return found


def _structural(node: Any, path: str, *, root: bool = False, bare: bool = False) -> list[Cause]:
    """The rules for structural schemas; `bare` is inside allOf, anyOf, oneOf and not, where types may not be said."""
    if not isinstance(node, dict):
        return [wrong(path, node, "must be an object")]
    found = [not_allowed(f"{path}.{key}", "not supported in structural schemas") for key in _FORBIDDEN if key in node]
    if node.get("uniqueItems"):
        found.append(not_allowed(f"{path}.uniqueItems", "uniqueItems cannot be set to true since the runtime "
                                 "complexity becomes quadratic"))  # fmt: skip
    if bare:
        free = node.get("x-kubernetes-int-or-string")
        found += [not_allowed(f"{path}.{k}", "must be undefined to be structural") for k in _VALUE_ONLY
                  if k in node and not (k == "type" and not free)]  # fmt: skip
    else:
        found += _node(node, path)
    for key, child in (node.get("properties") or {}).items():
        if not (root and key == "metadata"):
            found += _structural(child, f"{path}.properties[{key}]", bare=bare)
    for key in ("items", "additionalProperties", "not"):
        if key in node and not (key == "additionalProperties" and isinstance(node[key], bool)):
            found += _structural(node[key], f"{path}.{key}", bare=bare or key == "not")
    for key in ("allOf", "anyOf", "oneOf"):
        for i, child in enumerate(node.get(key) or ()):
            mixed = node.get("x-kubernetes-int-or-string") and key in ("anyOf", "allOf")
            found += [] if mixed else _structural(child, f"{path}.{key}[{i}]", bare=True)
    return found


def _node(node: Obj, path: str) -> list[Cause]:
    found: list[Cause] = []
    free = node.get("x-kubernetes-int-or-string") or node.get("x-kubernetes-preserve-unknown-fields")
    kind = node.get("type", "")
    if not kind and not free:
        found.append(required(f"{path}.type", "must not be empty for specified object fields"))
    elif kind and node.get("x-kubernetes-int-or-string"):
        found.append(wrong(f"{path}.type", kind, "must be empty if x-kubernetes-int-or-string is true"))
    elif kind and kind not in _TYPES:
        found.append(not_supported(f"{path}.type", kind, _TYPES))
    if kind == "array" and "items" not in node:
        found.append(required(f"{path}.items", "must be specified"))
    if node.get("properties") and node.get("additionalProperties"):
        found.append(
            not_allowed(f"{path}.additionalProperties", "additionalProperties and properties are mutual exclusive")
        )
    for key in ("pattern",):
        if key in node:
            try:
                schema.pattern(node[key])
            except re.error as error:
                found.append(
                    wrong(f"{path}.{key}", node[key], f"must be a valid regular expression, but isn't: {error}")
                )
    list_type, keys = node.get("x-kubernetes-list-type"), node.get("x-kubernetes-list-map-keys")
    if list_type not in (None, "atomic", "set", "map"):
        found.append(not_supported(f"{path}.x-kubernetes-list-type", list_type, ("atomic", "map", "set")))
    if (list_type == "map") != bool(keys):
        found.append(required(f"{path}.x-kubernetes-list-map-keys", "must be set if and only if the list type is map"))
    items: Obj = node["items"] if isinstance(node.get("items"), dict) else {}
    for i, key in enumerate(keys or ()):
        if key not in items.get("properties", {}):
            found.append(wrong(f"{path}.x-kubernetes-list-map-keys[{i}]", key, "must be a property of the items"))
        elif key not in items.get("required", ()) and "default" not in items["properties"][key]:
            why = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property"
            found.append(required(f"{path}.items.properties[{key}].default", why))
    if list_type and kind != "array":
        found.append(wrong(f"{path}.type", kind, "must be array if x-kubernetes-list-type is specified"))
    if keys and len(set(keys)) != len(keys):
        found.append(duplicate(f"{path}.x-kubernetes-list-map-keys", keys))
    return found


def _defaults(node: Mapping[str, Any], path: str) -> list[Cause]:
    """Defaults must themselves be valid and must not be pruned."""
    found: list[Cause] = []
    if "default" in node:
        wrapped = {"default": node["default"]}
        holder: Obj = {"type": "object", "properties": {"default": {k: v for k, v in node.items() if k != "default"}}}
        for dropped in schema.prune(holder, _deep(wrapped)):
            found.append(wrong(f"{path}.default", node["default"], f"must not have unknown fields, found {dropped}"))
        causes = schema.validate(holder, wrapped)
        found += [Cause(f"{path}.{c.field}", c.message, c.reason) for c in causes]
    for key, child in node.get("properties", {}).items():
        found += _defaults(child, f"{path}.properties[{key}]")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), Mapping):
            found += _defaults(node[key], f"{path}.{key}")
    return found


def _deep(value: Any) -> Any:
    return {k: _deep(v) for k, v in value.items()} if isinstance(value, dict) else value


def resource(crd: Mapping[str, Any]) -> Resource:
    """The Resource of a CRD that passed `validate`."""
    spec, names = crd["spec"], crd["spec"]["names"]
    version = next(v for v in spec["versions"] if v.get("served"))
    root = version["schema"]["openAPIV3Schema"]
    rules = cel.compile_rules(root, "", [])

    def check(obj: Obj, old: Obj | None) -> list[Cause]:
        found = schema.validate(root, obj, old)
        if rules is None:
            return found
        if any(c.reason in _BLOCKING for c in found):
            why = "some validation rules were not checked because the object was invalid; correct the existing errors "
            return [*found, Cause("<nil>", f"Invalid value: null: {why}to complete validation")]
        return found + cel.check(rules, obj, old)

    columns = tuple(_column(c) for c in version.get("additionalPrinterColumns") or ())
    return Resource(
        group=spec["group"],
        version=version["name"],
        plural=names["plural"],
        kind=names["kind"],
        singular=names.get("singular", ""),
        list_kind=names.get("listKind", ""),
        namespaced=spec["scope"] == "Namespaced",
        short_names=tuple(names.get("shortNames") or ()),
        categories=tuple(names.get("categories") or ()),
        fields=tuple(f["jsonPath"].lstrip(".") for f in version.get("selectableFields") or ()),
        status="status" in (version.get("subresources") or {}),
        generation=True,
        validate=check,
        columns=columns or (Column("Age", age, description="Age of the object"),),
        schema=root,
    )


def _column(raw: Mapping[str, Any]) -> Column:
    kind = raw["type"]
    cell = json_path(raw["jsonPath"], kind)
    return Column(raw["name"], cell, kind, raw.get("priority", 0), raw.get("description", ""), raw.get("format", ""))
