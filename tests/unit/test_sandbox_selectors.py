"""Label and field selectors."""

from __future__ import annotations

import pytest

from finetune_sandbox.errors import ApiError
from finetune_sandbox.selectors import field_values, from_label_selector, parse_fields, parse_labels

LABELS = {"app": "web", "tier": "front", "example.com/x": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("", True),
        ("app=web", True),
        ("app==web,tier!=back", True),
        ("app!=web", False),
        ("none!=x", True),
        ("app in (web, api)", True),
        ("app notin (web,api)", False),
        ("none notin (a)", True),
        ("app", True),
        ("!app", False),
        ("!none", True),
        ("none", False),
        ("example.com/x", True),
        ("example.com/x=", True),
        ("app in (web),tier in (back)", False),
    ],
)
def test_labels(text: str, matches: bool) -> None:
    assert parse_labels(text).matches(LABELS) is matches


@pytest.mark.parametrize("text", ["a in", "a=b,,c", "=x", "a b", "a=b,", "a in (b", "!"])
def test_labels_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_labels(text)
    assert caught.value.code == 400


def test_fields() -> None:
    pod = {"metadata": {"name": "p"}, "spec": {"unschedulable": True}}
    fields = ("metadata.name", "spec.nodeName", "spec.unschedulable")
    values = field_values(pod, fields)
    assert values == {"metadata.name": "p", "spec.nodeName": "", "spec.unschedulable": "true"}
    assert parse_fields("metadata.name=p,spec.nodeName=", fields).matches(values)
    assert not parse_fields("spec.unschedulable!=true", fields).matches(values)
    with pytest.raises(ApiError, match=r"field label not supported: spec\.other"):
        parse_fields("spec.other=1", fields)


def test_pins_are_what_an_index_can_answer() -> None:
    assert parse_labels("a=b,c!=d,e in (f),g in (h,i),j").pins() == [("a", "b"), ("e", "f")]


def test_label_selector_objects() -> None:
    expressions = [{"key": "tier", "operator": "In", "values": ["front"]}, {"key": "none", "operator": "DoesNotExist"}]
    assert from_label_selector({"matchLabels": {"app": "web"}, "matchExpressions": expressions}).matches(LABELS)
    assert from_label_selector({}).matches(LABELS)
