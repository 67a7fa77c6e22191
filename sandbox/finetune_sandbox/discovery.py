"""/version, /api, /apis and the lists of resources, in the plain form that every client falls back to."""

from __future__ import annotations

from finetune_sandbox.errors import Obj, not_implemented
from finetune_sandbox.requests import Route
from finetune_sandbox.resources import Kinds

VERSION = {
    "major": "1",
    "minor": "32",
    "gitVersion": "v1.32.0+finetune-sandbox",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "1970-01-01T00:00:00Z",
    "goVersion": "",
    "compiler": "",
    "platform": "linux/amd64",
}
REVIEWS = {
    "authentication.k8s.io": {"tokenreviews": "TokenReview", "selfsubjectreviews": "SelfSubjectReview"},
    "authorization.k8s.io": {
        "subjectaccessreviews": "SubjectAccessReview",
        "selfsubjectaccessreviews": "SelfSubjectAccessReview",
        "selfsubjectrulesreviews": "SelfSubjectRulesReview",
        "localsubjectaccessreviews": "LocalSubjectAccessReview",
    },
}
NAMESPACED_REVIEWS = ("localsubjectaccessreviews",)


def serve(path: str, kinds: Kinds, url: str) -> Obj | None:
    """The discovery document at `path`, None where there is none."""
    parts = path.strip("/").split("/")
    match parts:
        case ["version"]:
            return dict(VERSION)
        case ["api"]:
            address = [{"clientCIDR": "0.0.0.0/0", "serverAddress": url.partition("://")[2]}]
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": address}
        case ["api", "v1"]:
            return _resources(kinds, "", "v1")
        case ["apis"]:
            groups = {g: list(v) for g, v in kinds.groups().items()} | {g: ["v1"] for g in REVIEWS}
            listed = [_group(g, v) for g, v in groups.items()]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        case ["apis", group]:
            versions = ["v1"] if group in REVIEWS else kinds.groups().get(group)
            return {"kind": "APIGroup", "apiVersion": "v1"} | _group(group, versions) if versions else None
        case ["apis", group, version]:
            return _resources(kinds, group, version)
    return None


def _group(name: str, versions: list[str]) -> Obj:
    listed = [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def _resources(kinds: Kinds, group: str, version: str) -> Obj | None:
    rows = [row for r in kinds.version(group, version) for row in r.discovery()]
    if version == "v1":
        for plural, kind in REVIEWS.get(group, {}).items():
            namespaced = plural in NAMESPACED_REVIEWS
            row = {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind}
            rows.append(row | {"verbs": ["create"]})
    if not rows:
        return None
    full = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": full, "resources": rows}


def refuse_unserved(route: Route) -> None:
    """Raises ApiError 501 for what a real server has and whose silent absence would mislead."""
    if route.group == "admissionregistration.k8s.io":
        raise not_implemented(f"{route.plural}: the sandbox has validating policies and webhooks only")
    if route.group in ("apps", "apiregistration.k8s.io") or route.plural == "replicationcontrollers":
        raise not_implemented(f"{route.plural}.{route.group}: the sandbox has no controller for it")
    if route.plural in ("limitranges", "persistentvolumes", "horizontalpodautoscalers", "ingresses"):
        raise not_implemented(f"{route.plural}: not served by the sandbox")
