"""OpenAPI v3 (and v2 as JSON): whole schemas for custom kinds, for `kubectl explain` and validation; built-in kinds
appear as objects of unknown content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from finetune_sandbox.discovery import VERSION
from finetune_sandbox.errors import ApiError, Obj, path_not_found
from finetune_sandbox.resources import Kinds, Resource
from finetune_sandbox.store import dump

_STRING = {"type": "string"}
_META: Obj = {
    "description": "Standard object's metadata.",
    "type": "object",
    "properties": {
        "name": _STRING | {"description": "Name must be unique within a namespace."},
        "generateName": _STRING,
        "namespace": _STRING,
        "labels": {"type": "object", "additionalProperties": _STRING},
        "annotations": {"type": "object", "additionalProperties": _STRING},
        "finalizers": {"type": "array", "items": _STRING},
        "ownerReferences": {"type": "array", "items": {"type": "object"}},
        "uid": _STRING,
        "resourceVersion": _STRING,
        "generation": {"type": "integer"},
        "creationTimestamp": _STRING,
        "deletionTimestamp": _STRING,
    },
}
_META_NAME = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_VALIDATION = {"name": "fieldValidation", "in": "query", "schema": _STRING}
_DRY_RUN = {"name": "dryRun", "in": "query", "schema": _STRING}


def serve(path: str, kinds: Kinds, accept: str) -> web.Response:
    if path == "/openapi/v2":
        if "protobuf" in accept and "json" not in accept:
            raise ApiError(406, "NotAcceptable", "the sandbox serves OpenAPI v2 as JSON only", {})
        return _json(v2(kinds))
    if path == "/openapi/v3":
        return _json({"paths": {p: {"serverRelativeURL": _url(p, kinds)} for p in _paths(kinds)}})
    name = path.removeprefix("/openapi/v3/")
    if name not in _paths(kinds):
        raise path_not_found()
    return _json(v3(_of(name, kinds)))


def _json(body: Obj) -> web.Response:
    return web.Response(body=dump(body), content_type="application/json")


def _paths(kinds: Kinds) -> list[str]:
    return ["api/v1", *(f"apis/{g}/{v}" for g, versions in kinds.groups().items() for v in versions)]


def _of(path: str, kinds: Kinds) -> list[Resource]:
    parts = path.split("/")
    return kinds.version("" if parts[0] == "api" else parts[1], parts[-1])


def _url(path: str, kinds: Kinds) -> str:
    """The address with a hash of what is there, so that kubectl's cache notices a changed CRD."""
    digest = hashlib.sha256(dump([[r.kind, dict(r.schema or {})] for r in _of(path, kinds)])).hexdigest().upper()
    return f"/openapi/v3/{path}?hash={digest}"


def v3(resources: Sequence[Resource]) -> Obj:
    """The document of one group and version."""
    schemas: Obj = {_META_NAME: _META}
    paths: Obj = {}
    for r in resources:
        schemas[_name(r)] = _schema(r, f"#/components/schemas/{_META_NAME}")
        paths |= _operations(r)
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def v2(kinds: Kinds) -> Obj:
    definitions = {_name(r): _schema(r, f"#/definitions/{_META_NAME}") for r in kinds.all()}
    info = {"title": "Kubernetes", "version": VERSION["gitVersion"]}
    return {"swagger": "2.0", "info": info, "paths": {}, "definitions": {_META_NAME: _META} | definitions}


def _name(r: Resource) -> str:
    group = ".".join(reversed(r.group.split("."))) if r.group else "io.k8s.api.core"
    return f"{group}.{r.version}.{r.kind}"


def _gvk(r: Resource) -> Obj:
    return {"group": r.group, "kind": r.kind, "version": r.version}


def _schema(r: Resource, meta: str) -> Obj:
    body: Obj = dict(r.schema) if r.schema else {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    properties: Mapping[str, Any] = body.get("properties", {})
    own = {
        "apiVersion": _STRING | {"description": "The versioned schema of this representation of an object."},
        "kind": _STRING | {"description": "The REST resource this object represents."},
        "metadata": {"allOf": [{"$ref": meta}], "description": _META["description"], "default": {}},
    }
    return body | {"properties": {**properties, **own}, "x-kubernetes-group-version-kind": [_gvk(r)]}


def _operations(r: Resource) -> Obj:
    root = f"/apis/{r.group}/{r.version}" if r.group else f"/api/{r.version}"
    base = f"{root}/namespaces/{{namespace}}/{r.plural}" if r.namespaced else f"{root}/{r.plural}"
    ref = {"$ref": f"#/components/schemas/{_name(r)}"}
    content = {"application/json": {"schema": ref}}

    def operation(action: str, *types: str) -> Obj:
        body = {t: {"schema": ref} for t in types}
        op: Obj = {"x-kubernetes-action": action, "x-kubernetes-group-version-kind": _gvk(r)}
        op |= {"operationId": f"{action}{r.kind}", "responses": {"200": {"description": "OK", "content": content}}}
        return op | ({"requestBody": {"content": body}, "parameters": [_DRY_RUN, _VALIDATION]} if types else {})

    patches = ["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"]
    return {
        base: {"get": operation("list"), "post": operation("post", "application/json")},
        f"{base}/{{name}}": {
            "get": operation("get"),
            "put": operation("put", "application/json"),
            "patch": operation("patch", *patches),
            "delete": operation("delete"),
        },
    }
