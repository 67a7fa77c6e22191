"""What every suite relies on in an API server. The same tests pass on the sandbox's and on a real one.

This file: objects, patches, selectors, lists, deletion. Its neighbours go on: `…_watch`, `…_crd` (schemas, discovery,
tables), `…_identity` (tokens, reviews) and `…_jobs` (the Job controller).
"""

import asyncio
from datetime import datetime
from typing import Any

import pytest

from support.api import Api, Object, idle_pod
from support.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(60)]


def configmaps(namespace: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/configmaps" + (f"/{name}" if name else "")


def configmap(name: str, data: dict[str, str] | None = None, **metadata: Any) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **metadata}, "data": data or {}}


async def make(api: Api, namespace: str, name: str, data: dict[str, str] | None = None, **metadata: Any) -> Object:
    body: Object = (await api.create(configmaps(namespace), configmap(name, data, **metadata))).must(201)
    return body


def owned_by(owner: Object, **more: Any) -> Object:
    metadata = owner["metadata"]
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": metadata["name"], "uid": metadata["uid"], **more}


async def make_pod(api: Api, namespace: str, name: str) -> None:
    (await api.create(f"/api/v1/namespaces/{namespace}/pods", idle_pod(name))).must(201)


async def names(api: Api, path: str, **params: str) -> set[str]:
    return {item["metadata"]["name"] for item in await api.items(path, **params)}


async def gone(api: Api, path: str, timeout: float = 15.0) -> None:
    await eventually(lambda: api.get(path), f"404 for {path}", until=lambda a: a.status == 404, timeout=timeout)


# Objects


async def test_an_object_is_created_read_replaced_and_deleted(api: Api, namespace: str) -> None:
    made = await make(api, namespace, "a", {"k": "1"})
    metadata = made["metadata"]
    assert made["kind"] == "ConfigMap"
    assert metadata["namespace"] == namespace
    assert metadata["uid"]
    assert metadata["resourceVersion"]
    assert datetime.strptime(metadata["creationTimestamp"], "%Y-%m-%dT%H:%M:%SZ")
    path = configmaps(namespace, "a")
    assert (await api.get(path)).must(200) == made

    listed = (await api.get(configmaps(namespace))).must(200)
    assert listed["kind"] == "ConfigMapList"
    assert listed["metadata"]["resourceVersion"]
    assert "a" in {item["metadata"]["name"] for item in listed["items"]}
    assert "a" in await names(api, "/api/v1/configmaps")

    changed = (await api.replace(path, {**made, "data": {"k": "2"}})).must(200)
    assert changed["data"] == {"k": "2"}
    assert changed["metadata"]["uid"] == metadata["uid"]
    assert int(changed["metadata"]["resourceVersion"]) > int(metadata["resourceVersion"])

    same = (await api.replace(path, changed)).must(200)
    assert same["metadata"]["resourceVersion"] == changed["metadata"]["resourceVersion"], "nothing changed"

    (await api.delete(path)).must(200)
    (await api.get(path)).refused(404, "NotFound")


async def test_what_a_writer_may_not_set_is_ignored(api: Api, namespace: str) -> None:
    made = await make(api, namespace, "a", uid="mine", creationTimestamp="2001-01-01T00:00:00Z", generation=7)
    assert made["metadata"]["uid"] != "mine"
    assert not made["metadata"]["creationTimestamp"].startswith("2001")


REFUSED = [
    ("exists already", "POST", "", configmap("here"), 409, "AlreadyExists"),
    ("no such object", "PUT", "/absent", configmap("absent"), 404, "NotFound"),
    ("no such object to patch", "PATCH", "/absent", {"data": {}}, 404, "NotFound"),
    ("no such object to delete", "DELETE", "/absent", None, 404, "NotFound"),
    ("not a DNS name", "POST", "", configmap("Not_A_Name"), 422, "Invalid"),
    ("no name", "POST", "", {"apiVersion": "v1", "kind": "ConfigMap"}, 422, "Invalid"),
    ("another name than the path's", "PUT", "/here", configmap("there"), 400, "BadRequest"),
    ("another namespace than the path's", "POST", "", configmap("x", namespace="elsewhere"), 400, "BadRequest"),
    ("another kind than the path's", "POST", "", {**configmap("x"), "kind": "Secret"}, 400, "BadRequest"),
    ("stale write", "PUT", "/here", configmap("here", resourceVersion="1"), 409, "Conflict"),
    ("stale patch", "PATCH", "/here", {"metadata": {"resourceVersion": "1"}}, 409, "Conflict"),
    ("another uid", "DELETE", "/here", {"preconditions": {"uid": "another"}}, 409, "Conflict"),
    ("another version", "DELETE", "/here", {"preconditions": {"resourceVersion": "1"}}, 409, "Conflict"),
    ("not an object's label", "POST", "", configmap("x", labels={"a b": "c"}), 422, "Invalid"),
    ("wrong type", "POST", "", {**configmap("x"), "data": {"a": 1}}, 400, "BadRequest"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
async def test_a_refusal_says_why(
    api: Api, namespace: str, method: str, path: str, body: Object, status: int, reason: str
) -> None:
    before = await make(api, namespace, "here", {"k": "1"})
    content_type = "application/merge-patch+json" if method == "PATCH" else "application/json"
    answer = await api.call(method, configmaps(namespace) + path, body=body, content_type=content_type)
    assert answer.refused(status, reason)
    assert (await api.get(configmaps(namespace, "here"))).must(200) == before


async def test_a_refusal_names_the_object(api: Api, namespace: str) -> None:
    body = (await api.get(configmaps(namespace, "absent"))).must(404)
    assert body["details"] == {"name": "absent", "kind": "configmaps"}
    assert body["message"] == 'configmaps "absent" not found'


async def test_what_is_not_served_or_not_understood_is_refused(api: Api, namespace: str) -> None:
    (await api.create(configmaps("no-such-namespace"), configmap("x"))).refused(404, "NotFound")
    assert (await api.get(f"/api/v1/namespaces/{namespace}/gadgets")).status == 404
    assert (await api.get("/apis/no.such.group/v1/gadgets")).status == 404
    (await api.call("POST", configmaps(namespace), data=b"{")).refused(400, "BadRequest")
    answer = await api.call("PATCH", configmaps(namespace, "x"), body={}, content_type="application/json")
    answer.refused(415, "UnsupportedMediaType")
    assert (await api.call("GET", configmaps(namespace), token="nonsense")).status == 401


async def test_two_writers_from_the_same_version_conflict(api: Api, namespace: str) -> None:
    made = await make(api, namespace, "a", {"k": "0"})
    writes = [api.replace(configmaps(namespace, "a"), {**made, "data": {"k": str(n)}}) for n in range(1, 6)]
    statuses = sorted([answer.status for answer in await asyncio.gather(*writes)])
    assert statuses == [200, 409, 409, 409, 409]


async def test_generated_names(api: Api, namespace: str) -> None:
    body: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "run-"}}
    made = [(await api.create(configmaps(namespace), body)).must(201)["metadata"] for _ in range(2)]
    assert made[0]["name"] != made[1]["name"]
    for metadata in made:
        assert metadata["generateName"] == "run-"
        assert metadata["name"].startswith("run-")
        assert len(metadata["name"]) == len("run-") + 5


async def test_a_secret_takes_plain_strings(api: Api, namespace: str) -> None:
    body = {"metadata": {"name": "s"}, "stringData": {"user": "me"}}
    made = (await api.create(f"/api/v1/namespaces/{namespace}/secrets", body)).must(201)
    assert made["data"] == {"user": "bWU="}
    assert made["type"] == "Opaque"
    assert "stringData" not in made


async def test_a_dry_run_answers_and_changes_nothing(api: Api, namespace: str) -> None:
    await make(api, namespace, "here", {"k": "1"})
    made = (await api.create(configmaps(namespace), configmap("new"), dryRun="All")).must(201)
    assert made["metadata"]["name"] == "new"
    (await api.create(configmaps(namespace), configmap("here"), dryRun="All")).refused(409, "AlreadyExists")
    patched = (await api.patch(configmaps(namespace, "here"), {"data": {"k": "2"}}, dryRun="All")).must(200)
    assert patched["data"] == {"k": "2"}
    (await api.delete(configmaps(namespace, "here"), dryRun="All")).must(200)
    assert (await api.get(configmaps(namespace, "here"))).must(200)["data"] == {"k": "1"}
    (await api.get(configmaps(namespace, "new"))).refused(404, "NotFound")


async def test_what_is_immutable_stays(api: Api, namespace: str) -> None:
    body = {**configmap("fixed", {"k": "1"}), "immutable": True}
    (await api.create(configmaps(namespace), body)).must(201)
    for change in ({"data": {"k": "2"}}, {"immutable": False}):
        (await api.patch(configmaps(namespace, "fixed"), change)).refused(422, "Invalid")
    (await api.patch(configmaps(namespace, "fixed"), {"metadata": {"labels": {"a": "b"}}})).must(200)


async def test_a_headless_service(api: Api, namespace: str) -> None:
    spec = {"clusterIP": "None", "selector": {"a": "b"}, "publishNotReadyAddresses": True, "ports": [{"port": 29500}]}
    path = f"/api/v1/namespaces/{namespace}/services"
    made = (await api.create(path, {"metadata": {"name": "gang"}, "spec": spec})).must(201)["spec"]
    assert (made["clusterIP"], made["type"], made["publishNotReadyAddresses"]) == ("None", "ClusterIP", True)
    [port] = made["ports"]
    assert (port["port"], port["protocol"], port["targetPort"]) == (29500, "TCP", 29500)


# Patches


async def test_a_merge_patch_sets_and_removes(api: Api, namespace: str) -> None:
    await make(api, namespace, "a", {"keep": "1", "drop": "1"}, labels={"x": "1"})
    patch = {"data": {"drop": None, "new": "2"}, "metadata": {"labels": {"y": "2"}}}
    patched = (await api.patch(configmaps(namespace, "a"), patch)).must(200)
    assert patched["data"] == {"keep": "1", "new": "2"}
    assert patched["metadata"]["labels"] == {"x": "1", "y": "2"}
    again = (await api.patch(configmaps(namespace, "a"), patch)).must(200)
    assert again["metadata"]["resourceVersion"] == patched["metadata"]["resourceVersion"], "nothing changed"


async def test_a_json_patch_is_applied_in_order_and_whole_or_not_at_all(api: Api, namespace: str) -> None:
    await make(api, namespace, "a", {"k": "1", "drop": "1"})
    patch: list[Object] = [
        {"op": "test", "path": "/data/k", "value": "1"},
        {"op": "replace", "path": "/data/k", "value": "2"},
        {"op": "remove", "path": "/data/drop"},
        {"op": "add", "path": "/metadata/annotations", "value": {}},
        {"op": "add", "path": "/metadata/annotations/example.com~1a", "value": "x"},
    ]
    patched = (await api.patch(configmaps(namespace, "a"), patch, "json")).must(200)
    assert patched["data"] == {"k": "2"}
    assert patched["metadata"]["annotations"] == {"example.com/a": "x"}
    (await api.patch(configmaps(namespace, "a"), patch, "json")).refused(422, "Invalid")
    assert (await api.get(configmaps(namespace, "a"))).must(200) == patched


async def test_a_strategic_patch_merges_lists_by_their_keys(api: Api, namespace: str) -> None:
    await make_pod(api, namespace, "p")
    path = f"/api/v1/namespaces/{namespace}/pods/p/status"

    def condition(kind: str, status: str) -> Object:
        return {"status": {"conditions": [{"type": kind, "status": status}]}}

    for kind, status in [("Ready", "False"), ("DisruptionTarget", "True"), ("Ready", "True")]:
        patched = (await api.patch(path, condition(kind, status), "strategic")).must(200)
    conditions = {c["type"]: c["status"] for c in patched["status"]["conditions"]}
    assert conditions == {"Ready": "True", "DisruptionTarget": "True"}


async def test_server_side_apply_creates_and_then_merges(api: Api, namespace: str) -> None:
    path = configmaps(namespace, "a")
    (await api.patch(path, configmap("a", {"x": "1"}), "apply")).refused(422, "Invalid")  # no fieldManager
    made = (await api.patch(path, configmap("a", {"x": "1"}), "apply", fieldManager="one")).must(201)
    assert made["metadata"]["uid"]
    merged = (await api.patch(path, configmap("a", {"y": "2"}), "apply", fieldManager="two")).must(200)
    assert merged["data"] == {"x": "1", "y": "2"}
    again = (await api.patch(path, configmap("a", {"y": "2"}), "apply", fieldManager="two")).must(200)
    assert again["metadata"]["resourceVersion"] == merged["metadata"]["resourceVersion"], "nothing changed"


# Selectors and lists


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("app=a", {"one", "two"}),
        ("app==a,tier!=x", {"two"}),
        ("app in (a, b)", {"one", "two", "three"}),
        ("app notin (a)", {"three", "four"}),
        ("tier", {"one"}),
        ("!tier", {"two", "three", "four"}),
        ("app=none", set()),
    ],
)
async def test_label_selectors(api: Api, namespace: str, selector: str, found: set[str]) -> None:
    labels = {"one": {"app": "a", "tier": "x"}, "two": {"app": "a"}, "three": {"app": "b"}, "four": {}}
    for name, each in labels.items():
        await make(api, namespace, name, labels={**each, "ours": "yes"})
    assert await names(api, configmaps(namespace), labelSelector=f"ours=yes,{selector}") == found


async def test_field_selectors(api: Api, namespace: str) -> None:
    for name in ("one", "two"):
        await make_pod(api, namespace, name)
    pods = f"/api/v1/namespaces/{namespace}/pods"
    assert await names(api, pods, fieldSelector="metadata.name=one") == {"one"}
    assert await names(api, pods, fieldSelector="metadata.name!=one") == {"two"}
    assert await names(api, pods, fieldSelector="status.phase=Pending,spec.nodeName=") == {"one", "two"}
    assert await names(api, pods, fieldSelector="spec.nodeName=nowhere") == set()
    assert await names(api, "/api/v1/pods", fieldSelector=f"metadata.namespace={namespace}") == {"one", "two"}
    (await api.get(pods, fieldSelector="spec.no=1")).refused(400, "BadRequest")
    (await api.get(pods, labelSelector="a in")).refused(400, "BadRequest")


async def test_events_are_found_by_what_they_are_about(api: Api, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/events"
    for number, name in enumerate(("a", "b")):
        about = {"kind": "ConfigMap", "namespace": namespace, "name": name, "uid": f"uid-{name}"}
        body = {"metadata": {"name": f"e{number}"}, "involvedObject": about, "reason": "Why", "type": "Normal"}
        (await api.create(path, body)).must(201)
    assert await names(api, path, fieldSelector="involvedObject.name=a,involvedObject.uid=uid-a") == {"e0"}
    assert await names(api, path, fieldSelector="reason=Why,type=Normal") >= {"e0", "e1"}


async def test_a_long_list_comes_in_pages(api: Api, namespace: str) -> None:
    for number in range(5):
        await make(api, namespace, f"c{number}", labels={"ours": "yes"})
    query: Object = {"limit": 2, "labelSelector": "ours=yes"}
    pages = [(await api.get(configmaps(namespace), **query)).must(200)]
    await make(api, namespace, "late", labels={"ours": "yes"})
    while token := pages[-1]["metadata"].get("continue"):
        pages.append((await api.get(configmaps(namespace), **query, **{"continue": token})).must(200))
    found = [item["metadata"]["name"] for page in pages for item in page["items"]]
    assert [len(page["items"]) for page in pages] == [2, 2, 1]
    assert found == [f"c{number}" for number in range(5)], "in the state of the first page"
    assert len({page["metadata"]["resourceVersion"] for page in pages}) == 1
    (await api.get(configmaps(namespace), **{"continue": "nonsense"})).refused(400, "BadRequest")


# Deletion


async def test_finalizers_hold_an_object(api: Api, namespace: str) -> None:
    await make(api, namespace, "a", finalizers=["example.com/hold"])
    path = configmaps(namespace, "a")
    (await api.delete(path)).must(200)
    held = (await api.get(path)).must(200)
    assert held["metadata"]["deletionTimestamp"]
    more = {"metadata": {"finalizers": ["example.com/hold", "example.com/more"]}}
    (await api.patch(path, more)).refused(422, "Invalid")
    (await api.delete(path)).must(200)
    (await api.patch(path, {"metadata": {"finalizers": None}})).must(200)
    (await api.get(path)).refused(404, "NotFound")


async def test_deletion_by_uid_and_of_a_collection(api: Api, namespace: str) -> None:
    made = await make(api, namespace, "a")
    preconditions = {"preconditions": {"uid": made["metadata"]["uid"]}}
    (await api.delete(configmaps(namespace, "a"), preconditions)).must(200)
    for name in ("b", "c"):
        await make(api, namespace, name, labels={"ours": "yes"})
    await make(api, namespace, "d")
    (await api.delete(configmaps(namespace), labelSelector="ours=yes")).must(200)
    assert (await names(api, configmaps(namespace))) - {"kube-root-ca.crt"} == {"d"}


@pytest.mark.parametrize(("policy", "child_stays"), [("Background", False), ("Foreground", False), ("Orphan", True)])
async def test_propagation(api: Api, namespace: str, policy: str, child_stays: bool) -> None:
    owner = await make(api, namespace, "owner")
    await make(api, namespace, "child", ownerReferences=[owned_by(owner, blockOwnerDeletion=True)])
    (await api.delete(configmaps(namespace, "owner"), {"propagationPolicy": policy})).must(200)
    await gone(api, configmaps(namespace, "owner"))
    if child_stays:
        child = (await api.get(configmaps(namespace, "child"))).must(200)
        assert not child["metadata"].get("ownerReferences")
    else:
        await gone(api, configmaps(namespace, "child"))


async def test_in_the_foreground_the_owner_goes_last(api: Api, namespace: str) -> None:
    owner = await make(api, namespace, "owner")
    references = [owned_by(owner, blockOwnerDeletion=True)]
    await make(api, namespace, "child", ownerReferences=references, finalizers=["example.com/hold"])
    (await api.delete(configmaps(namespace, "owner"), {"propagationPolicy": "Foreground"})).must(200)
    child = configmaps(namespace, "child")
    await eventually(lambda: api.get(child), "deletion", until=lambda a: a.body["metadata"].get("deletionTimestamp"))
    held = (await api.get(configmaps(namespace, "owner"))).must(200)
    assert held["metadata"]["finalizers"] == ["foregroundDeletion"]
    (await api.patch(child, {"metadata": {"finalizers": None}})).must(200)
    await gone(api, configmaps(namespace, "owner"))


async def test_a_child_lives_while_one_of_its_owners_does(api: Api, namespace: str) -> None:
    first, second = await make(api, namespace, "first"), await make(api, namespace, "second")
    await make(api, namespace, "both", ownerReferences=[owned_by(first), owned_by(second)])
    await make(api, namespace, "only", ownerReferences=[owned_by(first)])
    (await api.delete(configmaps(namespace, "first"), {"propagationPolicy": "Background"})).must(200)
    await gone(api, configmaps(namespace, "only"))
    (await api.get(configmaps(namespace, "both"))).must(200)
    (await api.delete(configmaps(namespace, "second"), {"propagationPolicy": "Background"})).must(200)
    await gone(api, configmaps(namespace, "both"))


async def test_an_owner_is_its_uid_not_its_name(api: Api, namespace: str) -> None:
    owner = await make(api, namespace, "owner")
    await make(api, namespace, "child", ownerReferences=[owned_by(owner, uid="00000000-0000-4000-8000-000000000000")])
    await gone(api, configmaps(namespace, "child"))
    (await api.get(configmaps(namespace, "owner"))).must(200)


async def test_a_namespace_takes_its_content_along(api: Api, namespace: str) -> None:
    await make(api, namespace, "held", finalizers=["example.com/hold"])
    await make(api, namespace, "free")
    (await api.delete(f"/api/v1/namespaces/{namespace}")).must(200)
    await gone(api, configmaps(namespace, "free"))
    assert (await api.get(f"/api/v1/namespaces/{namespace}")).must(200)["status"]["phase"] == "Terminating"
    (await api.create(configmaps(namespace), configmap("late"))).refused(403, "Forbidden")
    (await api.patch(configmaps(namespace, "held"), {"metadata": {"finalizers": None}})).must(200)
    await gone(api, f"/api/v1/namespaces/{namespace}", timeout=30)
