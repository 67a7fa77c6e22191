"""Tokens and reviews, on which the progress server's trust stands. The same tests pass on both API servers."""

import pytest

from support.api import Api, Object, idle_pod
from support.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]

AUDIENCE = "finetune.dev/progress/0000"


async def make_pod(api: Api, namespace: str) -> Object:
    pod: Object = (await api.create(f"/api/v1/namespaces/{namespace}/pods", idle_pod("p"))).must(201)
    return pod


async def request_token(api: Api, namespace: str, spec: Object) -> Object:
    """The status of a TokenRequest for the namespace's default ServiceAccount."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    status: Object = (await api.create(path, body)).must(201)["status"]
    return status


async def review(api: Api, token: str, *audiences: str) -> Object:
    spec: Object = {"token": token}
    if audiences:
        spec["audiences"] = list(audiences)
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    status: Object = (await api.create("/apis/authentication.k8s.io/v1/tokenreviews", body)).must(201)["status"]
    return status


def bound_to(pod: Object) -> Object:
    metadata = pod["metadata"]
    return {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}


async def test_a_pods_token_tells_whose_it_is(api: Api, namespace: str) -> None:
    pod = await make_pod(api, namespace)
    spec = {"audiences": [AUDIENCE], "expirationSeconds": 600, "boundObjectRef": bound_to(pod)}
    issued = await request_token(api, namespace, spec)
    assert issued["expirationTimestamp"].endswith("Z")
    status = await review(api, issued["token"], AUDIENCE, "another")
    assert status["authenticated"] is True
    assert status["audiences"] == [AUDIENCE]
    user = status["user"]
    assert user["username"] == f"system:serviceaccount:{namespace}:default"
    assert {"system:serviceaccounts", f"system:serviceaccounts:{namespace}"} <= set(user["groups"])
    assert user["extra"]["authentication.kubernetes.io/pod-name"] == ["p"]
    assert user["extra"]["authentication.kubernetes.io/pod-uid"] == [pod["metadata"]["uid"]]


async def test_a_token_for_one_audience_is_nothing_to_another(api: Api, namespace: str) -> None:
    issued = await request_token(api, namespace, {"audiences": [AUDIENCE]})
    for audiences in (["another"], []):
        assert not (await review(api, issued["token"], *audiences)).get("authenticated")
    # Nor does it open the API server itself.
    assert (await api.call("GET", "/api/v1/namespaces", token=issued["token"])).status == 401


@pytest.mark.parametrize("token", ["nonsense", "a.b.c", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9."])
async def test_what_is_no_token_is_not_authenticated(api: Api, token: str) -> None:
    status = await review(api, token, AUDIENCE)
    assert not status.get("authenticated")
    assert "user" not in status or not status["user"].get("username")


async def test_a_token_dies_with_its_pod(api: Api, namespace: str) -> None:
    pod = await make_pod(api, namespace)
    issued = await request_token(api, namespace, {"audiences": [AUDIENCE], "boundObjectRef": bound_to(pod)})
    (await api.delete(f"/api/v1/namespaces/{namespace}/pods/p", gracePeriodSeconds=0)).must(200)
    await make_pod(api, namespace)  # another one by the same name
    await eventually(
        lambda: review(api, issued["token"], AUDIENCE),
        "refusal of the dead pod's token",
        until=lambda status: not status.get("authenticated"),
        timeout=20,
    )


@pytest.mark.parametrize(
    ("spec", "status", "reason"),
    [
        ({"boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "absent", "uid": "x"}}, 404, "NotFound"),
        ({"expirationSeconds": 1}, 422, "Invalid"),
    ],
    ids=["no such pod", "too short"],
)
async def test_a_token_request_is_refused(api: Api, namespace: str, spec: Object, status: int, reason: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token"
    (await api.create(path, {"spec": {"audiences": [AUDIENCE], **spec}})).refused(status, reason)


async def test_another_pods_uid_is_refused(api: Api, namespace: str) -> None:
    pod = await make_pod(api, namespace)
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default/token"
    spec = {"audiences": [AUDIENCE], "boundObjectRef": {**bound_to(pod), "uid": "another"}}
    (await api.create(path, {"spec": spec})).refused(409, "Conflict")


async def grant(api: Api, namespace: str) -> None:
    """The namespace's default ServiceAccount may read ConfigMaps and patch the one named `mine`."""
    base = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    rules = [
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["patch"], "resourceNames": ["mine"]},
        {"apiGroups": ["batch"], "resources": ["jobs/status"], "verbs": ["*"]},
    ]
    (await api.create(f"{base}/roles", {"metadata": {"name": "reader"}, "rules": rules})).must(201)
    binding = {
        "metadata": {"name": "reader"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": namespace}],
    }
    (await api.create(f"{base}/rolebindings", binding)).must(201)


async def allowed(api: Api, namespace: str, attributes: Object) -> bool:
    user = f"system:serviceaccount:{namespace}:default"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    spec = {"user": user, "groups": groups, "resourceAttributes": {"namespace": namespace, **attributes}}
    answer = await api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", {"spec": spec})
    return bool(answer.must(201)["status"]["allowed"])


ACCESS: list[tuple[Object, bool]] = [
    ({"verb": "get", "resource": "configmaps"}, True),
    ({"verb": "watch", "resource": "configmaps", "name": "any"}, True),
    ({"verb": "delete", "resource": "configmaps"}, False),
    ({"verb": "patch", "resource": "configmaps", "name": "mine"}, True),
    ({"verb": "patch", "resource": "configmaps", "name": "yours"}, False),
    ({"verb": "patch", "resource": "configmaps"}, False),
    ({"verb": "get", "resource": "secrets"}, False),
    ({"verb": "get", "resource": "configmaps", "group": "apps"}, False),
    ({"verb": "patch", "resource": "jobs", "group": "batch", "subresource": "status"}, True),
    ({"verb": "patch", "resource": "jobs", "group": "batch"}, False),
    ({"verb": "get", "resource": "configmaps", "namespace": "default"}, False),
]


async def test_access_reviews_follow_roles(api: Api, namespace: str) -> None:
    await grant(api, namespace)
    await eventually(lambda: allowed(api, namespace, ACCESS[0][0]), "the role's effect")
    seen = [(attributes, await allowed(api, namespace, attributes)) for attributes, _ in ACCESS]
    assert seen == ACCESS


async def test_a_service_accounts_token_opens_what_its_roles_allow(api: Api, namespace: str) -> None:
    token = (await request_token(api, namespace, {}))["token"]
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    message = (await api.call("GET", path, token=token)).refused(403, "Forbidden")
    assert f"system:serviceaccount:{namespace}:default" in message
    await grant(api, namespace)
    await eventually(lambda: api.call("GET", path, token=token), "access", until=lambda answer: answer.status == 200)
    (await api.call("DELETE", f"{path}/any", token=token)).refused(403, "Forbidden")
    attributes = {"namespace": namespace, "verb": "list", "resource": "configmaps"}
    answer = await api.call(
        "POST",
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
        body={"spec": {"resourceAttributes": attributes}},
        token=token,
    )
    assert answer.must(201)["status"]["allowed"] is True
