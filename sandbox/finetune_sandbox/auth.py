"""Who asks, and may they: bearer tokens, service-account tokens and RBAC."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_sandbox.errors import ApiError, Obj, not_found
from finetune_sandbox.store import Filter, Store
from finetune_sandbox.tokens import ISSUER, TokenSigner

MASTERS = "system:masters"
RBAC = "rbac.authorization.k8s.io"


@dataclass(frozen=True)
class User:
    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def info(self) -> Obj:
        body: Obj = {"username": self.name, "groups": list(self.groups)}
        if self.uid:
            body["uid"] = self.uid
        return body | ({"extra": {k: list(v) for k, v in self.extra.items()}} if self.extra else {})


ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))


@dataclass(frozen=True)
class Attributes:
    """What is asked for; `path` is set where it is no resource."""

    verb: str
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    def sentence(self, user: User) -> str:
        if self.path:
            return f'User "{user.name}" cannot {self.verb} path "{self.path}"'
        what = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        where = f'in the namespace "{self.namespace}"' if self.namespace else "at the cluster scope"
        return f'User "{user.name}" cannot {self.verb} resource "{what}" in API group "{self.group}" {where}'


class Authenticator:
    """Tokens to users. A token bound to a pod is good only while that pod, by UID, is there."""

    def __init__(self, store: Store) -> None:
        self.store, self.signer = store, TokenSigner()
        self.admin_token = secrets.token_urlsafe(32)

    def user(self, header: str | None) -> User:
        """The user of an Authorization header. Raises ApiError 401."""
        if header is None:
            return ANONYMOUS
        scheme, _, token = header.partition(" ")
        found = self.review(token.strip(), (ISSUER,)) if scheme.lower() == "bearer" else None
        if found is None:
            raise ApiError(401, "Unauthorized", "Unauthorized")
        return found

    def review(self, token: str, audiences: Sequence[str]) -> User | None:
        """The user of a token that is meant for one of `audiences`, None where it is not to be believed."""
        if secrets.compare_digest(token.encode(), self.admin_token.encode()):
            return User("kubernetes-admin", (MASTERS, "system:authenticated"))
        claims = self.signer.verify(token) if token.count(".") == 2 else None
        if claims is None or not set(claims["aud"]) & set(audiences):
            return None
        bound = claims["kubernetes.io"]
        namespace, account = bound["namespace"], bound["serviceaccount"]
        if not self._alive("serviceaccounts", namespace, account):
            return None
        extra = {"authentication.kubernetes.io/credential-id": [f"JTI={claims['jti']}"]}
        if pod := bound.get("pod"):
            if not self._alive("pods", namespace, pod):
                return None
            extra["authentication.kubernetes.io/pod-name"] = [pod["name"]]
            extra["authentication.kubernetes.io/pod-uid"] = [pod["uid"]]
            if node := bound.get("node"):
                extra["authentication.kubernetes.io/node-name"] = [node["name"]]
        return service_account(namespace, account["name"], account["uid"], extra)

    def _alive(self, resource: str, namespace: str, ref: Mapping[str, str]) -> bool:
        entry = self.store.get(resource, namespace, ref["name"])
        return entry is not None and entry.obj["metadata"]["uid"] == ref["uid"]

    def token_audiences(self, token: str) -> list[str]:
        claims = self.signer.verify(token) if token.count(".") == 2 else None
        return list(claims["aud"]) if claims else [ISSUER]

    def issue(self, namespace: str, name: str, spec: Mapping[str, Any]) -> tuple[str, float, list[str]]:
        """A token for a service account as TokenRequest's spec asks. Returns it, when it ends (Unix seconds) and its
        audiences. Raises ApiError 404 or 409 where the account or the bound object is not there."""
        account = self.store.get("serviceaccounts", namespace, name)
        if account is None:
            raise not_found("serviceaccounts", name)
        begin = int(time.time())
        end = begin + int(spec.get("expirationSeconds") or 3600)
        audiences = list(spec.get("audiences") or [ISSUER])
        private: Obj = {"namespace": namespace}
        private["serviceaccount"] = {"name": name, "uid": account.obj["metadata"]["uid"]}
        if ref := spec.get("boundObjectRef"):
            private |= self._bound(namespace, ref)
        claims = {"iss": ISSUER, "sub": f"system:serviceaccount:{namespace}:{name}", "aud": audiences, "iat": begin}
        claims |= {"nbf": begin, "exp": end, "jti": secrets.token_hex(16), "kubernetes.io": private}
        return self.signer.sign(claims), end, audiences

    def _bound(self, namespace: str, ref: Mapping[str, str]) -> Obj:
        if ref.get("kind") != "Pod":
            raise ApiError(501, "NotImplemented", f"the sandbox binds tokens to a Pod, not to a {ref.get('kind')}")
        pod = self.store.get("pods", namespace, ref.get("name", ""))
        if pod is None:
            raise not_found("pods", ref.get("name", ""))
        uid = pod.obj["metadata"]["uid"]
        if ref.get("uid", uid) != uid:
            why = f"the UID in the bound object reference ({ref['uid']}) does not match the UID in record ({uid})"
            raise ApiError(409, "Conflict", f'Operation cannot be fulfilled on pods "{ref["name"]}": {why}')
        private: Obj = {"pod": {"name": ref["name"], "uid": uid}}
        if node := pod.obj["spec"].get("nodeName"):
            private["node"] = {"name": node}
        return private


def service_account(namespace: str, name: str, uid: str = "", extra: Mapping[str, Sequence[str]] | None = None) -> User:
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
    return User(f"system:serviceaccount:{namespace}:{name}", groups, uid, extra or {})


class Authorizer:
    """RBAC over the Roles and bindings in the store; nothing is cached, so a change counts at once."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def allows(self, user: User, asked: Attributes) -> bool:
        if MASTERS in user.groups:
            return True
        return any(_permits(rule, asked) for rule in self.rules(user, asked.namespace))

    def rules(self, user: User, namespace: str) -> Iterator[Mapping[str, Any]]:
        """The rules that hold for a user in a namespace (cluster-wide ones with "")."""
        for entry in self.store.tables[f"clusterrolebindings.{RBAC}"].select(Filter()):
            if _binds(entry.obj, user, ""):
                yield from self._role("", entry.obj["roleRef"])
        if namespace:
            for entry in self.store.tables[f"rolebindings.{RBAC}"].select(Filter(namespace)):
                if _binds(entry.obj, user, namespace):
                    yield from self._role(namespace, entry.obj["roleRef"])

    def _role(self, namespace: str, ref: Mapping[str, str]) -> Sequence[Mapping[str, Any]]:
        cluster = ref["kind"] == "ClusterRole"
        plural, where = ("clusterroles", "") if cluster else ("roles", namespace)
        entry = self.store.get(f"{plural}.{RBAC}", where, ref["name"])
        return (entry.obj.get("rules") or ()) if entry else ()


def _binds(binding: Obj, user: User, namespace: str) -> bool:
    for subject in binding.get("subjects") or ():
        match subject["kind"]:
            case "User" if subject["name"] == user.name:
                return True
            case "Group" if subject["name"] in user.groups:
                return True
            case "ServiceAccount":
                where = subject.get("namespace") or namespace
                if user.name == f"system:serviceaccount:{where}:{subject['name']}":
                    return True
    return False


def _permits(rule: Mapping[str, Any], asked: Attributes) -> bool:
    def has(key: str, *wanted: str) -> bool:
        values = rule.get(key) or ()
        return "*" in values or any(w in values for w in wanted)

    if not has("verbs", asked.verb):
        return False
    if asked.path:
        urls = rule.get("nonResourceURLs") or ()
        return any(u == asked.path or (u.endswith("*") and asked.path.startswith(u[:-1])) for u in urls)
    resources = (
        [f"{asked.resource}/{asked.subresource}", f"*/{asked.subresource}"] if asked.subresource else [asked.resource]
    )
    names = rule.get("resourceNames")
    return has("apiGroups", asked.group) and has("resources", *resources) and (not names or asked.name in names)


def impersonate(user: User, headers: Mapping[str, str]) -> User:
    """The user that an admin acts as (Impersonate-User and -Group). Raises ApiError 403 for everyone else."""
    name = headers.get("Impersonate-User")
    if not name:
        return user
    if MASTERS not in user.groups:
        raise ApiError(403, "Forbidden", f'users "{name}" is forbidden: only an admin may impersonate in the sandbox')
    groups = tuple(v for k, v in headers.items() if k.lower() == "impersonate-group")
    if not groups and name.startswith("system:serviceaccount:"):
        _, _, namespace, account = name.split(":", 3)
        return service_account(namespace, account)
    return User(name, (*groups, "system:authenticated"))
