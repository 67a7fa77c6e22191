"""What of admission the sandbox does not do is refused when it is registered, never half obeyed."""

from dataclasses import replace
from typing import Any

import pytest

from finetune_sandbox import policies, webhooks
from finetune_sandbox.auth import User
from finetune_sandbox.gate import Asked, meant, selected
from finetune_sandbox.kinds import BUILTIN
from finetune_sandbox.registry import Registry
from finetune_sandbox.resources import Kinds, Resource
from finetune_sandbox.store import Store

RULE = {"apiGroups": ["g"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["things"]}
THINGS = Resource("g", "v1", "things", "Thing")


def asked(operation: str = "CREATE", sub: str = "", resource: Resource = THINGS) -> Asked:
    metadata = {"name": "a", "namespace": "n"} if resource.namespaced else {"name": "a"}
    return Asked(User("u"), operation, resource, sub, {"metadata": metadata}, None, False)


def policy(**spec: Any) -> dict[str, Any]:
    whole = {"matchConstraints": {"resourceRules": [RULE]}, "validations": [{"expression": "true"}]}
    return {"metadata": {"name": "p"}, "spec": whole | spec}


def webhook(**members: Any) -> dict[str, Any]:
    whole = {"name": "a.b.c", "clientConfig": {"url": "https://x"}, "rules": [RULE], "sideEffects": "None"}
    made = {"metadata": {"name": "w"}, "webhooks": [whole | members]}
    webhooks.default(made)
    return made


def test_what_it_does_is_taken() -> None:
    assert policies.validate(policy(), None) == []
    assert policies.validate_binding({"spec": {"policyName": "p", "validationActions": ["Deny"]}}, None) == []
    assert webhooks.validate(webhook(), None) == []


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"matchConstraints": {"resourceRules": [RULE | {"operations": ["CONNECT"]}]}}, "operations"),
        ({"matchConstraints": {"resourceRules": [RULE | {"operations": ["*"]}]}}, "operations"),
        ({"validations": []}, "spec.validations"),
        ({"validations": [{"expression": "object.spec. =="}]}, "spec.validations[0].expression"),
        ({"validations": [{"expression": "true", "reason": "Because"}]}, "spec.validations[0].reason"),
        ({"variables": [{"name": "a", "expression": "("}]}, "spec.variables[0].expression"),
        ({"failurePolicy": "Maybe"}, "spec.failurePolicy"),
        ({"validations": [{"expression": "quantity('1') == 1"}]}, "spec.validations[0].expression"),
        ({"validations": [{"expression": "nobody.knows"}]}, "spec.validations[0].expression"),
        ({"matchConditions": [{"name": "a", "expression": "self.a"}]}, "spec.matchConditions[0].expression"),
        ({"matchConstraints": {"resourceRules": [RULE | {"resourceNames": ["a"]}]}}, "resourceNames"),
        ({"matchConstraints": {"resourceRules": [RULE], "excludeResourceRules": [RULE]}}, "excludeResourceRules"),
    ],
)
def test_a_policy_that_it_cannot_hold_is_refused(spec: dict[str, Any], field: str) -> None:
    assert any(field in cause.field for cause in policies.validate(policy(**spec), None))


def test_a_binding_that_only_audits_is_refused() -> None:
    (cause,) = policies.validate_binding({"spec": {"policyName": "p", "validationActions": ["Audit"]}}, None)
    assert cause.field == "spec.validationActions"


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"rules": [RULE | {"operations": ["CONNECT"]}]}, "operations"),
        ({"rules": [RULE | {"operations": ["DELETE"]}]}, "operations"),
        ({"sideEffects": None}, "sideEffects"),
        ({"failurePolicy": "Maybe"}, "failurePolicy"),
        ({"matchConditions": [{"name": "a", "expression": "true"}]}, "matchConditions"),
    ],
)
def test_a_webhook_that_it_cannot_ask_is_refused(members: dict[str, Any], field: str) -> None:
    assert any(field in cause.field for cause in webhooks.validate(webhook(**members), None))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, True),
        ({"apiGroups": ["*"]}, True),
        ({"apiGroups": ["h"]}, False),
        ({"apiVersions": ["v2"]}, False),
        ({"operations": ["UPDATE"]}, False),
        ({"resources": ["*"]}, True),
        ({"resources": ["things/status"]}, False),
        ({"resources": ["others"]}, False),
        ({"scope": "Cluster"}, False),
        ({"scope": "Namespaced"}, True),
    ],
)
def test_a_rule_means_what_it_names(rule: dict[str, Any], expected: bool) -> None:
    assert meant([RULE | rule], asked()) is expected


def test_a_part_of_an_object_is_named_by_itself() -> None:
    assert not meant([RULE], asked(sub="status"))
    for resources in (["things/status"], ["things/*"], ["*/status"], ["*/*"]):
        assert meant([RULE | {"resources": resources}], asked(sub="status"))


def test_labels_before_or_after_a_change_select_it() -> None:
    store = Registry(Store(10), Kinds(BUILTIN)).store
    where = {"objectSelector": {"matchLabels": {"a": "b"}}}
    plain = {"metadata": {"name": "a"}}
    labelled = {"metadata": {"name": "a", "labels": {"a": "b"}}}
    for new, old, expected in (
        (labelled, plain, True),
        (plain, labelled, True),
        (None, labelled, True),
        (labelled, None, True),
        (plain, plain, False),
    ):
        assert selected(where, replace(asked(), new=new, old=old), store) is expected


def test_what_a_request_does_not_have_is_left_out_as_on_a_real_server() -> None:
    assert "subResource" not in asked().request("u")
    assert asked(sub="status").request("u")["subResource"] == "status"
