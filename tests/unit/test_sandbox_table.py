"""Printer columns: JSONPath, ages and the Table that kubectl prints."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_sandbox.resources import Column, Resource
from finetune_sandbox.store import Entry
from finetune_sandbox.table import human_duration, json_path, render

OBJ: dict[str, Any] = {
    "metadata": {"name": "x", "annotations": {"a.b/c": "d"}},
    "spec": {"n": 3, "f": 0.5, "on": True, "list": [{"name": "a", "v": "1"}, {"name": "b", "v": "2"}]},
}


@pytest.mark.parametrize(
    ("path", "kind", "cell"),
    [
        (".spec.n", "integer", 3),
        (".spec.n", "string", "3"),
        (".spec.f", "number", 0.5),
        (".spec.on", "boolean", True),
        (".spec.on", "string", "true"),
        (".spec.list[1].v", "string", "2"),
        (".spec.list[*].v", "string", "1"),
        ('.spec.list[?(@.name=="b")].v', "string", "2"),
        (".metadata.annotations['a.b/c']", "string", "d"),
        (".spec.none.deeper", "string", None),
        (".spec.list[9].v", "string", None),
        (".spec.none", "date", None),
    ],
)
def test_json_path(path: str, kind: str, cell: Any) -> None:
    assert json_path(path, kind)(OBJ) == cell


def test_a_path_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="cannot read the JSONPath"):
        json_path(".spec[?(@.a>1)]")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "<invalid>"), (0, "0s"), (119, "119s"), (120, "2m"), (190, "3m10s"), (3600, "60m"), (10800, "3h"),
        (11400, "3h10m"), (86400, "24h"), (180000, "2d2h"), (864000, "10d"), (63072000 + 864000, "2y10d"),
    ],
)  # fmt: skip
def test_ages(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text


def test_a_table() -> None:
    date = (datetime.now(UTC) - timedelta(hours=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    obj = {"metadata": {"name": "x", "creationTimestamp": date}, "spec": {"n": 3}}
    columns = (Column("N", json_path(".spec.n", "integer"), "integer", 1), Column("Age", json_path(".metadata.creationTimestamp", "date"), "date"))  # fmt: skip  # noqa: E501
    resource = Resource("g", "v1", "xs", "X", columns=columns)
    table = render(resource, [Entry(obj, 7, {})], {"resourceVersion": "7"}, "Metadata")
    assert [(c["name"], c["type"], c["priority"]) for c in table["columnDefinitions"]] == [
        ("Name", "string", 0),
        ("N", "integer", 1),
        ("Age", "date", 0),
    ]
    assert table["rows"][0]["cells"] == ["x", 3, "5h"]
    assert table["rows"][0]["object"]["metadata"]["name"] == "x"
    assert render(resource, [], {}, "None", head=False)["columnDefinitions"] == []
