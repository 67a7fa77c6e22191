"""The patch languages and server-side apply's merge, by tables."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from finetune_sandbox import patch
from finetune_sandbox.errors import ApiError


@pytest.mark.parametrize(
    ("document", "change", "expected"),
    [  # the examples of RFC 7386
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge(document: Any, change: Any, expected: Any) -> None:
    assert patch.merge(document, change) == expected


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([{"op": "add", "path": "/a/-", "value": 3}], {"a": [1, 2, 3], "b": {"x/y": 1}}),
        ([{"op": "add", "path": "/a/0", "value": 0}], {"a": [0, 1, 2], "b": {"x/y": 1}}),
        ([{"op": "replace", "path": "/b/x~1y", "value": 2}], {"a": [1, 2], "b": {"x/y": 2}}),
        ([{"op": "remove", "path": "/a/0"}, {"op": "test", "path": "/a/0", "value": 2}], {"a": [2], "b": {"x/y": 1}}),
        ([{"op": "move", "from": "/a/1", "path": "/c"}], {"a": [1], "b": {"x/y": 1}, "c": 2}),
        ([{"op": "copy", "from": "/b", "path": "/c"}], {"a": [1, 2], "b": {"x/y": 1}, "c": {"x/y": 1}}),
    ],
)
def test_json_patch(operations: Any, expected: Any) -> None:
    document = {"a": [1, 2], "b": {"x/y": 1}}
    before = copy.deepcopy(document)
    assert patch.json_patch(document, operations) == expected
    assert document == before


@pytest.mark.parametrize(
    ("operations", "code"),
    [
        ([{"op": "test", "path": "/a", "value": 2}], 422),
        ([{"op": "remove", "path": "/none"}], 422),
        ([{"op": "replace", "path": "/none", "value": 1}], 422),
        ([{"op": "add", "path": "/l/9", "value": 1}], 422),
        ([{"op": "jump", "path": "/a"}], 400),
        ([{"op": "add", "path": "a", "value": 1}], 400),
        ({"op": "add"}, 400),
    ],
)
def test_json_patch_that_does_not_apply(operations: Any, code: int) -> None:
    with pytest.raises(ApiError) as caught:
        patch.json_patch({"a": 1, "l": []}, operations)
    assert caught.value.code == code


ENV = {"containers": [{"name": "m", "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}]}


@pytest.mark.parametrize(
    ("document", "change", "expected"),
    [
        (
            ENV,
            {"containers": [{"name": "m", "env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]}]},
            {"containers": [{"name": "m", "env": [{"name": n, "value": v} for n, v in ("A1", "B3", "C4")]}]},
        ),
        (
            ENV,
            {"containers": [{"name": "m", "env": [{"name": "A", "$patch": "delete"}]}]},
            {"containers": [{"name": "m", "env": [{"name": "B", "value": "2"}]}]},
        ),
        (
            {"ports": [{"port": 80}]},
            {"ports": [{"port": 80, "name": "http"}]},
            {"ports": [{"port": 80, "name": "http"}]},
        ),
        ({"finalizers": ["a"]}, {"finalizers": ["b"]}, {"finalizers": ["a", "b"]}),
        ({"finalizers": ["a", "b"]}, {"$deleteFromPrimitiveList/finalizers": ["a"]}, {"finalizers": ["b"]}),
        ({"args": ["a"]}, {"args": ["b"]}, {"args": ["b"]}),
        ({"m": {"a": 1}}, {"m": {"$patch": "replace", "b": 2}}, {"m": {"b": 2}}),
        ({"m": {"a": 1}}, {"m": {"a": None}}, {"m": {}}),
        ({"s": {"a": 1, "b": 2}}, {"s": {"$retainKeys": ["b", "c"], "c": 3}}, {"s": {"b": 2, "c": 3}}),
        (
            {"volumes": [{"name": "a"}, {"name": "b"}]},
            {"$setElementOrder/volumes": [{"name": "b"}, {"name": "c"}, {"name": "a"}], "volumes": [{"name": "c"}]},
            {"volumes": [{"name": "b"}, {"name": "c"}, {"name": "a"}]},
        ),
    ],
)
def test_strategic(document: Any, change: Any, expected: Any) -> None:
    assert patch.strategic(document, change) == expected


def test_strategic_needs_the_merge_key() -> None:
    with pytest.raises(ApiError, match="merge key 'name'"):
        patch.strategic(ENV, {"containers": [{"image": "x"}]})


def test_apply_merges_lists_by_their_keys() -> None:
    document = {"spec": {"volumes": [{"name": "a", "emptyDir": {}}], "args": ["x"], "kept": 1}}
    config = {"spec": {"volumes": [{"name": "a", "emptyDir": {"medium": "Memory"}}, {"name": "b"}], "args": ["y"]}}
    merged = patch.apply(document, config, patch.builtin_list_keys)
    volumes = [{"name": "a", "emptyDir": {"medium": "Memory"}}, {"name": "b"}]
    assert merged == {"spec": {"volumes": volumes, "args": ["y"], "kept": 1}}
