"""What a URL names and what its query asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_sandbox.errors import bad_request
from finetune_sandbox.resources import Resource
from finetune_sandbox.selectors import parse_fields, parse_labels
from finetune_sandbox.store import Filter

NAMESPACE_SUBRESOURCES = ("status", "finalize")


@dataclass(frozen=True)
class Route:
    """`/apis/<group>/<version>/namespaces/<namespace>/<plural>/<name>/<sub>`; what is not there is empty."""

    group: str
    version: str
    plural: str
    namespace: str = ""
    name: str = ""
    sub: str = ""


def parse_path(path: str) -> Route | None:
    """The resource that a path is about, None where it is about none (discovery, health, OpenAPI)."""
    parts = [p for p in path.split("/") if p]
    if len(parts) > 2 and parts[0] == "api":
        group, version, rest = "", parts[1], parts[2:]
    elif len(parts) > 3 and parts[0] == "apis":
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    if len(rest) > 2 and rest[0] == "namespaces" and rest[2] not in NAMESPACE_SUBRESOURCES:
        namespace, rest = rest[1], rest[2:]
    elif len(rest) > 1 and rest[0] == "namespaces":
        # A namespace itself: RBAC and the object's place treat it as in itself.
        return Route(group, version, "namespaces", "", rest[1], "/".join(rest[2:]))
    else:
        namespace = ""
    name = rest[1] if len(rest) > 1 else ""
    return Route(group, version, rest[0], namespace, name, "/".join(rest[2:]))


def filter_of(resource: Resource, route: Route, query: Mapping[str, str]) -> Filter:
    """What a list, a watch or a deletecollection selects. Raises ApiError 400."""
    labels = parse_labels(query.get("labelSelector", ""))
    fields = parse_fields(query.get("fieldSelector", ""), resource.selectable)
    return Filter(route.namespace, labels, fields)


def wants_table(accept: str, query: Mapping[str, str]) -> str:
    """How much of each object a wanted Table carries (None, Metadata, Object), "" where no Table is wanted."""
    first = next((a for a in re.split(r"\s*,\s*", accept) if a), "").replace(" ", "")
    if "as=Table" not in first or "g=meta.k8s.io" not in first or "v=v1" not in first.split(";"):
        return ""
    include = query.get("includeObject") or "Metadata"
    if include not in ("None", "Metadata", "Object"):
        raise bad_request(f"includeObject: expected None, Metadata or Object, found {include!r}")
    return include


def revision(text: str) -> int:
    if not text.isdigit():
        raise bad_request(f"resourceVersion: expected a number, found {text!r}")
    return int(text)
