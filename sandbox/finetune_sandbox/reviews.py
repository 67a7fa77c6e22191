"""Questions that are answered, not stored: TokenReview, access reviews and who am I."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from finetune_sandbox.auth import MASTERS, Attributes, Authenticator, Authorizer, User
from finetune_sandbox.discovery import NAMESPACED_REVIEWS, REVIEWS
from finetune_sandbox.errors import Obj, bad_request, required, wrong
from finetune_sandbox.errors import invalid as invalid_error
from finetune_sandbox.requests import Route
from finetune_sandbox.tokens import ISSUER


class Reviews:
    def __init__(self, auth: Authenticator, authorizer: Authorizer) -> None:
        self.auth, self.authorizer = auth, authorizer
        self._answers: Mapping[str, Callable[[Route, User, Obj], Obj]] = {
            "tokenreviews": self._token,
            "selfsubjectreviews": lambda route, user, spec: {"userInfo": user.info()},
            "subjectaccessreviews": self._access,
            "localsubjectaccessreviews": self._access,
            "selfsubjectaccessreviews": lambda route, user, spec: self._decide(user, spec),
            "selfsubjectrulesreviews": self._rules,
        }

    def serves(self, route: Route) -> bool:
        known = route.plural in REVIEWS.get(route.group, {}) and route.version == "v1" and not route.name
        return known and bool(route.namespace) == (route.plural in NAMESPACED_REVIEWS)

    def create(self, route: Route, user: User, body: Any) -> Obj:
        """The review with its status. Raises ApiError 400 or 422."""
        kind = REVIEWS[route.group][route.plural]
        if not isinstance(body, dict) or body.get("kind", kind) != kind:
            raise bad_request(f"expected a {kind}")
        spec = body.get("spec") or {}
        if not isinstance(spec, dict):
            raise bad_request("spec: expected an object")
        status = self._answers[route.plural](route, user, spec)
        head = {"kind": kind, "apiVersion": f"{route.group}/v1", "metadata": {"creationTimestamp": None}}
        return head | ({"spec": spec} if spec else {}) | {"status": status}

    def _token(self, route: Route, user: User, spec: Obj) -> Obj:
        if not (token := spec.get("token")):
            raise bad_request("token is required for TokenReview in authentication")
        wanted = spec.get("audiences") or [ISSUER]
        found = self.auth.review(token, wanted)
        if found is None:
            return {"user": {}, "error": "[invalid bearer token, token is expired, for another audience, or bound to "
                    "an object that is gone]"}  # fmt: skip
        audiences = wanted if MASTERS in found.groups else [a for a in wanted if a in self.auth.token_audiences(token)]
        return {"authenticated": True, "user": found.info(), "audiences": audiences}

    def _access(self, route: Route, user: User, spec: Obj) -> Obj:
        if not (spec.get("user") or spec.get("groups")):
            cause = required("spec.user", "at least one of user or group must be specified")
            raise invalid_error(REVIEWS[route.group][route.plural], route.group, "", [cause])
        where = (spec.get("resourceAttributes") or {}).get("namespace", "")
        if route.namespace and where != route.namespace:
            raise bad_request(f"spec.resourceAttributes.namespace must match namespace: {route.namespace}")
        return self._decide(User(spec.get("user", ""), tuple(spec.get("groups") or ())), spec)

    def _decide(self, user: User, spec: Obj) -> Obj:
        resource, path = spec.get("resourceAttributes"), spec.get("nonResourceAttributes")
        if (resource is None) == (path is None):
            why = "exactly one of nonResourceAttributes or resourceAttributes must be specified"
            raise invalid_error(
                "SubjectAccessReview", "authorization.k8s.io", "", [wrong("spec.resourceAttributes", resource, why)]
            )
        if path is not None:
            asked = Attributes(path.get("verb", ""), path=path.get("path", ""))
        else:
            assert resource is not None
            keys = ("verb", "group", "resource", "subresource", "namespace", "name")
            asked = Attributes(**{k: str(resource.get(k, "")) for k in keys})
        return {"allowed": self.authorizer.allows(user, asked)}

    def _rules(self, route: Route, user: User, spec: Obj) -> Obj:
        found = list(self.authorizer.rules(user, spec.get("namespace", "")))
        if MASTERS in user.groups:
            found.append({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]})
            found.append({"verbs": ["*"], "nonResourceURLs": ["*"]})
        return {
            "resourceRules": [r for r in found if r.get("resources")],
            "nonResourceRules": [r for r in found if r.get("nonResourceURLs")],
            "incomplete": False,
        }
