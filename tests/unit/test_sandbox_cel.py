"""CEL rules: what they see, when they run, and what they answer."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_sandbox import cel
from finetune_sandbox.errors import Cause


def ruled(*rules: dict[str, Any], **properties: Any) -> dict[str, Any]:
    spec = {"type": "object", "properties": properties, "x-kubernetes-validations": list(rules)}
    return {"type": "object", "properties": {"spec": spec}}


def check(schema: dict[str, Any], new: dict[str, Any], old: dict[str, Any] | None = None) -> list[Cause]:
    problems: list[Cause] = []
    root = cel.compile_rules(schema, "", problems)
    assert root is not None
    assert problems == []
    return cel.check(root, {"metadata": {"name": "x"}, "spec": new}, {"spec": old} if old is not None else None)


TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
LIST = {"type": "array", "items": {"type": "object", "properties": {"name": TEXT}}}


@pytest.mark.parametrize(
    ("rule", "spec", "holds"),
    [
        ("has(self.a) != has(self.b)", {"a": "x"}, True),
        ("has(self.a) != has(self.b)", {"a": "x", "b": "y"}, False),
        ("self.a.matches('^s3://[a-z]+/$')", {"a": "s3://bucket/"}, True),
        ("size(self.l) > 1 && self.l.all(i, i.name in ['a', 'b'])", {"l": [{"name": "a"}, {"name": "b"}]}, True),
        ("self.l.exists(i, i.name == 'c')", {"l": [{"name": "a"}]}, False),
        ("self.l.filter(i, i.name == 'a').size() == 1", {"l": [{"name": "a"}, {"name": "a"}]}, False),
        ("self.f < 1.0", {"f": 0}, True),
        ("self.f + 0.5 == 1.5", {"f": 1}, True),
        ("self.a.startsWith('a') && !self.a.contains('..')", {"a": "a/../b"}, False),
        ("self.a.split('/').size() == 2 && self.a.lowerAscii() == 'x/y'", {"a": "X/Y"}, True),
        ("!has(self.n) || self.n > 1 ? true : self.a == 'x'", {"n": 1, "a": "y"}, False),
        ("self.m.all(k, self.m[k] > 0)", {"m": {"a": 1, "b": 0}}, False),
        ("self.__if__ == 'x' && self.__dash__ == ''", {"if": "x", "-": ""}, True),
    ],
)
def test_rules(rule: str, spec: dict[str, Any], holds: bool) -> None:
    properties = {"a": TEXT, "b": TEXT, "l": LIST, "f": NUMBER, "n": WHOLE, "if": TEXT, "-": TEXT}
    properties["m"] = {"type": "object", "additionalProperties": WHOLE}
    causes = check(ruled({"rule": rule, "message": "broken"}, **properties), spec)
    assert [c.message for c in causes] == ([] if holds else ["Invalid value: broken"])
    assert all(c.field == "spec" for c in causes)


def test_every_broken_rule_is_reported_with_its_path_reason_and_message() -> None:
    rules = [
        {"rule": "self.n > 1", "message": "n is small", "fieldPath": ".n", "reason": "FieldValueForbidden"},
        {"rule": "self.n > 2", "messageExpression": "'n is ' + string(self.n)"},
        {"rule": "self.n > 3"},
    ]
    causes = check(ruled(*rules, n=WHOLE), {"n": 1})
    assert [(c.field, c.message, c.reason) for c in causes] == [
        ("spec.n", "Forbidden: n is small", "FieldValueForbidden"),
        ("spec", "Invalid value: n is 1", "FieldValueInvalid"),
        ("spec", "Invalid value: failed rule: self.n > 3", "FieldValueInvalid"),
    ]


def test_transition_rules_run_on_update_only() -> None:
    frozen: dict[str, Any] = {**TEXT, "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "frozen"}]}
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"a": frozen}}}}
    assert check(schema, {"a": "x"}) == []
    assert check(schema, {"a": "x"}, {"a": "x"}) == []
    assert check(schema, {"a": "x"}, {}) == [], "there is no old value to compare with"
    assert [c.field for c in check(schema, {"a": "y"}, {"a": "x"})] == ["spec.a"]


def test_transition_rules_follow_the_keys_of_a_map_list() -> None:
    item: dict[str, Any] = {"type": "object", "properties": {"name": TEXT, "n": WHOLE}}
    item["x-kubernetes-validations"] = [{"rule": "self.n >= oldSelf.n", "message": "n never shrinks"}]
    parts = {"type": "array", "items": item, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": {"parts": parts}}}}
    old = {"parts": [{"name": "a", "n": 1}, {"name": "b", "n": 5}]}
    assert check(schema, {"parts": [{"name": "b", "n": 5}, {"name": "a", "n": 2}]}, old) == []
    causes = check(schema, {"parts": [{"name": "b", "n": 4}]}, old)
    assert [c.field for c in causes] == ["spec.parts[0]"]


def test_what_did_not_change_is_not_judged_again() -> None:
    schema = ruled({"rule": "self.n > 1", "message": "small"}, n=WHOLE)
    assert check(schema, {"n": 1}, {"n": 1}) == []
    assert len(check(schema, {"n": 0}, {"n": 1})) == 1


def test_a_rule_that_cannot_be_evaluated_refuses() -> None:
    schema = ruled({"rule": "self.a == 'x'", "message": "a is x"}, a=TEXT)
    [cause] = check(schema, {})
    assert cause.message == "Invalid value: no such key: a evaluating rule: a is x"


def test_the_root_sees_the_name_alone_of_the_metadata() -> None:
    schema = {
        "type": "object",
        "x-kubernetes-validations": [{"rule": "size(self.metadata.name) > 1"}],
        "properties": {},
    }
    assert len(check(schema, {})) == 1
