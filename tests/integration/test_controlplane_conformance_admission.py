"""Validating policies and webhooks: what they are asked, and what their answers do. Alike on every control plane."""

import base64
import datetime
import json
import secrets
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from finetune_operator import tls
from support.api import Api
from support.waiting import eventually

pytestmark = pytest.mark.integration
REGISTRATION = "/apis/admissionregistration.k8s.io/v1"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
Object = dict[str, Any]


def config(name: str, **data: str) -> Object:
    return {"metadata": {"name": name, "labels": {"app": "x"}}, "data": data}


def rule(*operations: str) -> Object:
    return {"apiGroups": [""], "apiVersions": ["v1"], "operations": list(operations), "resources": ["configmaps"]}


@dataclass
class Registered:
    """What a test registers for ConfigMaps of its namespace, and takes back at its end."""

    api: Api
    namespace: str
    paths: list[str] = field(default_factory=list)

    @property
    def maps(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/configmaps"

    async def create(self, plural: str, body: Object) -> Object:
        body = {"metadata": {"name": f"t-{secrets.token_hex(4)}"}, **body}
        made: Object = (await self.api.create(f"{REGISTRATION}/{plural}", body)).must(201)
        self.paths.append(f"{REGISTRATION}/{plural}/{made['metadata']['name']}")
        return made

    def here(self) -> Object:
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}}}

    async def policy(self, *, actions: tuple[str, ...] = ("Deny",), ref: Object | None = None, **spec: Any) -> None:
        """A policy that is bound and in force: a probe of ours is denied, and none is stored."""
        probe = {"expression": "object.metadata.name != 'probe'", "message": "in force"}
        spec["validations"] = [probe, *spec["validations"]]
        if params := spec.pop("params", None):
            spec["paramKind"] = params
        match = {"resourceRules": [rule("CREATE", "UPDATE")]}
        made = await self.create("validatingadmissionpolicies", {"spec": {"matchConstraints": match, **spec}})
        binding: Object = {"policyName": made["metadata"]["name"], "validationActions": ["Deny"]}
        binding |= {"matchResources": self.here()} | ({"paramRef": ref} if ref else {})
        await self.create("validatingadmissionpolicybindings", {"spec": binding})
        await self.in_force()
        if actions != ("Deny",):
            change = {"spec": {"validationActions": list(actions)}}
            (await self.api.patch(self.paths[-1], change)).must(200)
            probe_path = {"dryRun": "All"}
            await eventually(
                lambda: self.api.create(self.maps, config("probe"), **probe_path),
                "other actions",
                until=lambda answer: answer.status == 201,
            )

    async def in_force(self) -> None:
        await eventually(
            lambda: self.api.create(self.maps, config("probe"), dryRun="All"),
            "a denied probe",
            until=lambda answer: answer.status != 201,
        )


@pytest.fixture
async def registered(api: Api, namespace: str) -> AsyncIterator[Registered]:
    made = Registered(api, namespace)
    yield made
    for path in made.paths:
        await api.delete(path)


async def test_a_policy_denies_with_its_message_and_names_itself(registered: Registered) -> None:
    checks = [
        {"expression": "!has(object.data.a) || variables.long < 4", "messageExpression": "'a: found ' + object.data.a"},
        {"expression": "!has(object.data.b)", "message": "b: not here", "reason": "Forbidden"},
        {"expression": "object.data.c == 'c'"},
    ]
    variables = [{"name": "long", "expression": "object.data.a.size()"}]
    conditions = [{"name": "some", "expression": "has(object.data) || object.metadata.name == 'probe'"}]
    await registered.policy(validations=checks, variables=variables, matchConditions=conditions)
    api, maps = registered.api, registered.maps
    message = (await api.create(maps, config("j", a="long", c="c"))).refused(422, "Invalid")
    assert "ValidatingAdmissionPolicy" in message
    assert message.endswith("denied request: a: found long")
    assert (await api.create(maps, config("j", b="", c="c"))).refused(403, "Forbidden").endswith("b: not here")
    assert "failed expression" in (await api.create(maps, config("j", c="d"))).refused(422, "Invalid")
    # An expression that fails denies too.
    assert "no such key: c" in (await api.create(maps, config("j", a="abc"))).refused(422, "Invalid")
    (await api.create(maps, config("j", a="abc", c="c"))).must(201)
    (await api.create(maps, {"metadata": {"name": "empty"}})).must(201)


async def test_a_policy_sees_the_old_object_the_author_and_the_operation(registered: Registered) -> None:
    checks = [
        {"expression": "request.operation == 'CREATE' ? oldObject == null : oldObject.data.a <= object.data.a"},
        {"expression": "request.userInfo.username != '' && request.namespace == object.metadata.namespace"},
    ]
    await registered.policy(validations=checks)
    api, maps = registered.api, registered.maps
    (await api.create(maps, config("j", a="b"))).must(201)
    (await api.patch(f"{maps}/j", {"data": {"a": "c"}})).must(200)
    assert (await api.patch(f"{maps}/j", {"data": {"a": "a"}})).status == 422
    assert (await api.get(f"{maps}/j")).body["data"] == {"a": "c"}
    (await api.delete(f"{maps}/j")).must(200)


async def test_a_policy_asks_what_the_author_may_do(registered: Registered) -> None:
    question = "authorizer.group('').resource('secrets').namespace(object.metadata.namespace).name(object.data.secret)"
    checks = [{"expression": f"!has(object.data.secret) || {question}.check('get').allowed()", "message": "not yours"}]
    await registered.policy(validations=checks)
    api, maps, namespace = registered.api, registered.maps, registered.namespace
    (await api.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "alice"}})).must(201)
    allowed = [
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["hers"], "verbs": ["get"]},
    ]
    base = f"{RBAC}/namespaces/{namespace}"
    (await api.create(f"{base}/roles", {"metadata": {"name": "r"}, "rules": allowed})).must(201)
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "r"}
    subjects = [{"kind": "ServiceAccount", "name": "alice", "namespace": namespace}]
    binding = {"metadata": {"name": "r"}, "roleRef": ref, "subjects": subjects}
    (await api.create(f"{base}/rolebindings", binding)).must(201)
    ask = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/alice/token"
    token = (await api.create(path, ask)).must(201)["status"]["token"]
    await eventually(
        lambda: api.create(maps, config("j", secret="hers"), token=token, dryRun="All"),
        "the role to hold",
        until=lambda answer: answer.status == 201,
    )
    refused = await api.create(maps, config("j", secret="theirs"), token=token)
    assert refused.refused(422, "Invalid").endswith("not yours")
    (await api.create(maps, config("j", secret="theirs"))).must(201)


async def test_a_policy_is_asked_once_for_each_of_its_parameters(registered: Registered) -> None:
    api, maps = registered.api, registered.maps
    for name in ("one", "two"):
        (await api.create(maps, {"metadata": {"name": name, "labels": {"for": "policy"}}, "data": {"no": name}})).must(
            201
        )
    params = {"apiVersion": "v1", "kind": "ConfigMap"}
    ref = {
        "selector": {"matchLabels": {"for": "policy"}},
        "namespace": registered.namespace,
        "parameterNotFoundAction": "Deny",
    }
    expression = "!has(object.data) || !has(object.data.x) || object.data.x != params.data.no"
    await registered.policy(
        params=params, ref=ref, validations=[{"expression": expression, "messageExpression": "'not ' + params.data.no"}]
    )
    for name in ("one", "two"):
        assert (await api.create(maps, config("j", x=name))).refused(422, "Invalid").endswith(f"not {name}")
    (await api.create(maps, config("j", x="three"))).must(201)


async def test_a_warning_denies_nothing(registered: Registered) -> None:
    checks = [{"expression": "!has(object.data) || !has(object.data.odd)", "message": "odd"}]
    await registered.policy(actions=("Warn",), validations=checks)
    (await registered.api.create(registered.maps, config("j", odd="x"))).must(201)


@dataclass
class Asked:
    """A webhook that answers as it is told, and what it was asked."""

    reviews: list[Object] = field(default_factory=list)
    allow: bool = True
    status: Object | None = None
    warnings: list[str] = field(default_factory=list)
    code: int = 200

    async def answer(self, request: web.BaseRequest) -> web.Response:
        review = await request.json()
        asked = review["request"]
        if asked["name"] != "probe":
            self.reviews.append(asked)
        response = {"uid": asked["uid"], "allowed": self.allow and asked["name"] != "probe", "warnings": self.warnings}
        if self.status:
            response["status"] = self.status
        body = {"apiVersion": review["apiVersion"], "kind": review["kind"], "response": response}
        return web.json_response(body, status=self.code)


@pytest.fixture
async def asked(registered: Registered, tmp_path: Path) -> AsyncIterator[Asked]:
    """It is registered for the ConfigMaps of the namespace, in force, and fails closed."""
    asked = Asked()
    files = tls.ensure(tmp_path / "tls", ["127.0.0.1"], datetime.datetime.now(datetime.UTC))
    runner = web.ServerRunner(web.Server(asked.answer, access_log=None))
    await runner.setup()
    context: ssl.SSLContext = files.context()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    authority = base64.b64encode(files.ca.read_bytes()).decode()
    client = {"url": f"https://127.0.0.1:{runner.addresses[0][1]}/x", "caBundle": authority}
    hook = {
        "name": "a.test.example",
        "clientConfig": client,
        "rules": [rule("CREATE", "UPDATE")],
        "sideEffects": "None",
    }
    hook |= {"admissionReviewVersions": ["v1"], "timeoutSeconds": 5} | registered.here()
    await registered.create("validatingwebhookconfigurations", {"webhooks": [hook]})
    await registered.in_force()
    yield asked
    await runner.cleanup()


async def test_a_webhook_gets_the_object_as_it_would_be_stored_and_who_asks(
    registered: Registered, asked: Asked
) -> None:
    api, maps = registered.api, registered.maps
    (await api.create(maps, config("j", a="b"))).must(201)
    (await api.patch(f"{maps}/j", {"data": {"a": "c"}})).must(200)
    (await api.delete(f"{maps}/j")).must(200)
    create, update = asked.reviews
    assert (create["operation"], create["oldObject"], create["namespace"]) == ("CREATE", None, registered.namespace)
    assert create["object"]["data"] == {"a": "b"}
    assert create["kind"] == {"group": "", "version": "v1", "kind": "ConfigMap"}
    assert create["resource"] == {"group": "", "version": "v1", "resource": "configmaps"}
    assert "system:masters" in create["userInfo"]["groups"]
    assert (update["operation"], update["oldObject"]["data"], update["object"]["data"]) == (
        "UPDATE",
        {"a": "b"},
        {"a": "c"},
    )


async def test_a_refusal_is_handed_on_with_its_code(registered: Registered, asked: Asked) -> None:
    asked.allow, asked.status = False, {"code": 403, "reason": "Forbidden", "message": "data.a: found b; c is allowed"}
    message = (await registered.api.create(registered.maps, config("j", a="b"))).refused(403, "Forbidden")
    assert message == 'admission webhook "a.test.example" denied the request: data.a: found b; c is allowed'
    assert (await registered.api.get(f"{registered.maps}/j")).status == 404


async def test_a_webhook_that_fails_closed_admits_nothing_when_it_is_broken(
    registered: Registered, asked: Asked
) -> None:
    asked.code = 503
    message = (await registered.api.create(registered.maps, config("j"))).refused(500, "InternalError")
    assert 'failed calling webhook "a.test.example"' in message
    change = json.loads('[{"op": "replace", "path": "/webhooks/0/failurePolicy", "value": "Ignore"}]')
    (await registered.api.patch(registered.paths[-1], change, "json")).must(200)
    await eventually(
        lambda: registered.api.create(registered.maps, config("j"), dryRun="All"),
        "another policy for failures",
        until=lambda answer: answer.status == 201,
    )


async def test_what_is_not_selected_is_not_asked_about(registered: Registered, asked: Asked) -> None:
    (await registered.api.create("/api/v1/namespaces/default/configmaps", config("other-place"))).must(201)
    (await registered.api.delete("/api/v1/namespaces/default/configmaps/other-place")).must(200)
    assert asked.reviews == []
