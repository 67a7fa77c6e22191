"""What `kubectl get` prints: metav1.Table from printer columns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from finetune_sandbox.errors import Obj
from finetune_sandbox.meta import parse_time
from finetune_sandbox.resources import Column, Resource
from finetune_sandbox.store import Entry

_STEP = re.compile(
    r"\.([A-Za-z0-9_\-]+)|\['([^']*)'\]|\[(\d+|\*)\]|\[\?\(@\.([A-Za-z0-9_.]+)==[\"']([^\"']*)[\"']\)\]|\.(\*)"
)


def human_duration(seconds: float) -> str:
    """Seconds as kubectl writes ages: 45s, 3m20s, 5h12m, 3d4h, 2y10d."""
    total = int(seconds)
    if total < -1:
        return "<invalid>"
    total = max(total, 0)
    minutes, hours, days = total // 60, total // 3600, total // 86400

    def pair(whole: int, unit: str, rest: int, small: str) -> str:
        return f"{whole}{unit}{rest}{small}" if rest else f"{whole}{unit}"

    if total < 120:
        return f"{total}s"
    if minutes < 10:
        return pair(minutes, "m", total % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return pair(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if hours < 192:
        return pair(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    if days < 2920:
        return pair(days // 365, "y", days % 365, "d")
    return f"{days // 365}y"


def since(timestamp: Any) -> str:
    if not isinstance(timestamp, str):
        return "<unknown>"
    return human_duration((datetime.now(UTC) - parse_time(timestamp)).total_seconds())


def age(obj: Mapping[str, Any]) -> str:
    return since(obj["metadata"].get("creationTimestamp"))


def json_path(path: str, kind: str = "string") -> Callable[[Mapping[str, Any]], Any]:
    """The cell of a printer column: the JSONPath that CRDs use (fields, indices, `[*]`, `[?(@.a=="b")]`).

    A path that cannot be read raises ValueError; one that leads nowhere gives None, shown as nothing.
    """
    steps, at = [], 0
    while at < len(path):
        if not (m := _STEP.match(path, at)):
            raise ValueError(f"cannot read the JSONPath {path!r} at {path[at:]!r}")
        steps.append(m)
        at = m.end()

    def cell(obj: Mapping[str, Any]) -> Any:
        found: list[Any] = [obj]
        for step in steps:
            found = [child for value in found for child in _take(value, step)]
        return _shown(found[0], kind) if found else None

    return cell


def _take(value: Any, step: re.Match[str]) -> Sequence[Any]:
    field, quoted, index, key, wanted, star = step.groups()
    if (name := field or quoted) is not None:
        return [value[name]] if isinstance(value, Mapping) and name in value else []
    if star or index == "*":
        return list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []
    if not isinstance(value, list):
        return []
    if index is not None:
        return value[int(index) : int(index) + 1]
    return [v for v in value if isinstance(v, Mapping) and str(v.get(key)) == wanted]


def _shown(value: Any, kind: str) -> Any:
    match kind:
        case "integer":
            return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        case "number":
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        case "boolean":
            return value if isinstance(value, bool) else None
        case "date":
            return since(value) if isinstance(value, str) else "<unknown>"
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else str(value)


def columns(resource: Resource) -> list[Column]:
    name = Column(
        "Name", lambda o: o["metadata"]["name"], "string", 0, "Name must be unique within a namespace.", "name"
    )
    return [name, *(resource.columns or (Column("Age", age, description="Age of the object"),))]


def render(resource: Resource, entries: Sequence[Entry], list_meta: Obj, include: str, *, head: bool = True) -> Obj:
    """A metav1.Table; `include` says how much of each object goes along: None, Metadata or Object."""
    shown = columns(resource)
    heads = [
        {"name": c.name, "type": c.type, "format": c.format, "description": c.description, "priority": c.priority}
        for c in shown
    ]
    rows: list[Obj] = []
    for entry in entries:
        row: Obj = {"cells": [c.cell(entry.obj) for c in shown]}
        if include == "Object":
            row["object"] = entry.obj
        elif include != "None":
            partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}
            row["object"] = partial | {"metadata": entry.obj["metadata"]}
        rows.append(row)
    body = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": list_meta}
    return body | {"columnDefinitions": heads if head else [], "rows": rows}
