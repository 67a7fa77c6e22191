"""What the chart grants the operator, what an operator asks for, and a way to run one with nothing but the former."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aiohttp import web

from support.api import Api
from support.operating import Proxy
from support.waiting import eventually

Object = dict[str, Any]
RBAC = "/apis/rbac.authorization.k8s.io/v1"
PLURALS = {
    "ClusterRole": "clusterroles",
    "ClusterRoleBinding": "clusterrolebindings",
    "Role": "roles",
    "RoleBinding": "rolebindings",
}


class Right(NamedTuple):
    """One thing that somebody may do, or did."""

    group: str
    resource: str
    """The plural; `plural/sub` for a part of it."""
    verb: str


@dataclass
class Recorder(Proxy):
    """Passes requests on with the credentials in `headers`; keeps what was asked for, and what of it was refused."""

    used: set[Right] = field(default_factory=set)
    refused: set[Right] = field(default_factory=set)

    async def forward(self, request: web.BaseRequest) -> web.StreamResponse:
        right = asked_for(request.method, request.path, "watch" in request.query)
        if right:
            # At once: a watch ends when its client does.
            self.used.add(right)
        response = await super().forward(request)
        if right and response.status in (401, 403):
            self.refused.add(right)
        return response


def asked_for(method: str, path: str, watches: bool) -> Right | None:
    """The right that a request takes; None where the path is no resource's."""
    match path.strip("/").split("/"):
        case ["api", _, *rest]:
            group = ""
        case ["apis", group, _, *rest]:
            pass
        case _:
            return None
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    if not rest:
        return None
    resource = "/".join([rest[0], *rest[2:3]])
    read = "watch" if watches else "get" if len(rest) > 1 else "list"
    verbs = {"GET": read, "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
    return Right(group, resource, verbs[method])


def of_account(manifests: Sequence[Object], account: str) -> list[Object]:
    """The bindings of a ServiceAccount, and the roles that they bind it to."""
    bindings = [
        m
        for m in manifests
        if m["kind"] in ("RoleBinding", "ClusterRoleBinding") and any(s["name"] == account for s in m["subjects"])
    ]
    named = {(m["roleRef"]["kind"], m["roleRef"]["name"]) for m in bindings}
    roles = [m for m in manifests if (m["kind"], m["metadata"]["name"]) in named]
    assert len(roles) == len(named)
    return [*roles, *bindings]


def granted(manifests: Sequence[Object]) -> set[Right]:
    return {right for m in manifests if m["kind"] in ("Role", "ClusterRole") for right in _rights(m)}


def _rights(role: Object) -> Iterator[Right]:
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                yield from (Right(group, resource, verb) for verb in rule["verbs"])


async def apply(api: Api, manifests: Sequence[Object]) -> None:
    for manifest in manifests:
        (await api.create(_path(manifest), manifest)).must(201)


async def remove(api: Api, manifests: Sequence[Object]) -> None:
    for manifest in manifests:
        await api.delete(f"{_path(manifest)}/{manifest['metadata']['name']}")


def _path(manifest: Object) -> str:
    namespace = manifest["metadata"].get("namespace")
    scope = f"/namespaces/{namespace}" if namespace and manifest["kind"] in ("Role", "RoleBinding") else ""
    return f"{RBAC}{scope}/{PLURALS[manifest['kind']]}"


@asynccontextmanager
async def kueue(api: Api) -> AsyncIterator[None]:
    """An API server that knows Workloads; they are gone afterwards, where they were not known before."""
    crds, name = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", "workloads.kueue.x-k8s.io"
    crd: Object = {
        # The real API server asks for the annotation of such groups.
        "metadata": {"name": name, "annotations": {"api-approved.kubernetes.io": "unapproved, a test's"}},
        "spec": {
            "group": "kueue.x-k8s.io",
            "scope": "Namespaced",
            "names": {"kind": "Workload", "listKind": "WorkloadList", "plural": "workloads", "singular": "workload"},
            "versions": [
                {
                    "name": "v1beta1",
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
                }
            ],
        },
    }
    made = await api.create(crds, crd)
    assert made.status in (201, 409), made.body
    group = "/apis/kueue.x-k8s.io/v1beta1/workloads"
    await eventually(lambda: api.get(group), "Workloads", until=lambda a: a.status == 200, timeout=30)
    try:
        yield
    finally:
        if made.status == 201:
            await api.delete(f"{crds}/{name}")
            await eventually(lambda: api.get("/apis/kueue.x-k8s.io"), "no Workloads", until=lambda a: a.status == 404)


async def token_of(api: Api, namespace: str, account: str) -> str:
    """Of a ServiceAccount, for the API server itself."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    made: str = (await api.create(path, {"spec": {"expirationSeconds": 3600}})).must(201)["status"]["token"]
    return made
