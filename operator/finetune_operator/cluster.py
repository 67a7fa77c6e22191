"""The API server, as the rest of the operator sees it. The only module that talks to it.

Objects are plain dicts as the server sends them: the client's typed models refuse quantities that are numbers and cost
time and memory. Reads are live (no cache): a LIST that failed raises, because unknown is not absent.
"""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import urlencode
from urllib.request import getproxies

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.config_exception import ConfigException
from kubernetes.aio.config.incluster_config import load_incluster_config
from kubernetes.aio.config.kube_config import load_kube_config

from finetune_api import API_VERSION
from finetune_operator.kueue import GROUP as KUEUE
from finetune_operator.kueue import JOB_UID
from finetune_operator.manifests import JOB_LABEL, MANAGED_BY

Object = dict[str, Any]
"""A Kubernetes object as JSON."""

FIELD_MANAGER = "finetune-operator"
PAGE = 500
MAX_DEPTH = 20_000
"""Of objects in objects, in what an API server answers; it takes none of more than 10,000."""


class ApiError(Exception):
    """The API server refused: `status` is the HTTP code (0: it was not reached), `reason` that of metav1.Status."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else f"{reason}: {message}")
        self.status = status
        self.reason = reason


async def load_configuration() -> Configuration:
    """Who we are: `$KUBECONFIG` where it is set, else the pod's ServiceAccount, else ~/.kube/config.

    Raises ApiError.
    """
    configuration = Configuration()
    try:
        if in_cluster():
            load_incluster_config(client_configuration=configuration)
        else:
            file = os.environ.get("KUBECONFIG") or None
            await load_kube_config(file, client_configuration=configuration, persist_config=False)
    except ConfigException as error:
        raise ApiError(0, "NoCredentials", str(error)) from error
    return configuration


def in_cluster() -> bool:
    return not os.environ.get("KUBECONFIG") and "KUBERNETES_SERVICE_HOST" in os.environ


class Kind(NamedTuple):
    """Where objects of a kind live."""

    api: str
    plural: str
    namespaced: bool = True


KINDS: Mapping[str, Kind] = {
    "FineTuneJob": Kind(f"/apis/{API_VERSION}", "finetunejobs"),
    "FineTuneProfile": Kind(f"/apis/{API_VERSION}", "finetuneprofiles", namespaced=False),
    "Job": Kind("/apis/batch/v1", "jobs"),
    "Pod": Kind("/api/v1", "pods"),
    "Service": Kind("/api/v1", "services"),
    "ConfigMap": Kind("/api/v1", "configmaps"),
    "NetworkPolicy": Kind("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Event": Kind("/api/v1", "events"),
    "Lease": Kind("/apis/coordination.k8s.io/v1", "leases"),
    "TokenReview": Kind("/apis/authentication.k8s.io/v1", "tokenreviews", namespaced=False),
    "SubjectAccessReview": Kind("/apis/authorization.k8s.io/v1", "subjectaccessreviews", namespaced=False),
    # Only for certificates.py, which runs under an account of its own; the operator may do nothing with either.
    "Secret": Kind("/api/v1", "secrets"),
    "ValidatingWebhookConfiguration": Kind(
        "/apis/admissionregistration.k8s.io/v1", "validatingwebhookconfigurations", namespaced=False
    ),
}


class TokenUser(NamedTuple):
    """Whose token it is, by TokenReview."""

    username: str
    pod_name: str | None
    """None where the token is bound to no pod."""
    pod_uid: str | None


class Cluster(Protocol):
    """What the operator asks of a cluster. Methods raise ApiError where the server refuses or cannot be reached."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        """The object, or None where it does not exist."""

    async def list_children(self, kind: str, namespace: str, job: str) -> list[Object]:
        """Objects of the kind that carry this FineTuneJob's label, whoever owns them."""

    async def list_profiles(self) -> list[Object]: ...

    def list_all(self, kind: str, namespaces: tuple[str, ...]) -> AsyncIterator[Object]:
        """Every FineTuneJob, or every Job or pod that this operator manages, page by page, so that not all of them are
        in memory at once; no namespaces: all."""

    async def create(self, manifest: Object) -> Object:
        """Creates the object. ApiError's reason is AlreadyExists where the name is taken."""

    async def delete(self, kind: str, namespace: str, name: str, uid: str, resource_version: str | None = None) -> bool:
        """Deletes exactly this object, its dependants in the background. False: it was gone, or is another by now."""

    async def patch_status(
        self, namespace: str, name: str, uid: str, patch: Object, resource_version: str | None = None
    ) -> Object | None:
        """One merge patch of a FineTuneJob's status; the job as it is then. None: it is gone, or is not at that version
        any more."""

    async def patch_profile_status(self, name: str, patch: Object) -> bool:
        """One merge patch of a FineTuneProfile's status. False: it is gone."""

    async def list_workloads(self, namespace: str, job_uid: str) -> list[Object] | None:
        """What Kueue made of a Job; None: the server knows no such kind."""

    async def post_event(self, event: Object) -> None:
        """Creates an Event, or counts up the one of the same name."""

    # For the metrics server.

    async def authenticate(self, token: str) -> Object | None:
        """The token's user (authentication.k8s.io/v1 UserInfo), or None where it is no token of this cluster."""

    async def may_get(self, user: Mapping[str, Any], url: str) -> bool:
        """Whether a user may `get` this nonResourceURL."""

    # For the progress server.

    async def token_review(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        """The token's user, or None where the token is not valid for one of the audiences."""

    async def get_pod(self, namespace: str, name: str) -> Object | None: ...

    async def get_job(self, namespace: str, name: str) -> Object | None:
        """The FineTuneJob, or None."""

    async def patch_trainer_status(
        self, namespace: str, name: str, uid: str, trainer_status: Object, resource_version: str | None = None
    ) -> bool:
        """Merge-patches status.trainerStatus and nothing else. False: the job is gone, or is not at that version."""


Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
RETRIED = (429, 502, 503, 504)
"""Codes that say `later`: nothing was done, or doing it twice does no harm, since names and UIDs are fixed."""


class KubeCluster:
    """`Cluster` over HTTP. One per event loop; `close` it."""

    def __init__(
        self,
        configuration: Configuration,
        *,
        timeout: float = 30.0,
        attempts: int = 5,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_call: Callable[[str, str, int | str, float], None] = lambda verb, resource, code, seconds: None,
    ) -> None:
        """`timeout`: seconds for one request. `attempts`: tries of one call while the server says 429 or 5xx.
        `on_call(verb, resource, code or word, seconds)` hears of every request."""
        # Otherwise aiohttp looks for ~/.netrc and for proxies in the environment before each request, in a thread.
        configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
        self._client = ApiClient(configuration)
        self._client.user_agent = FIELD_MANAGER
        self._host: str = configuration.host
        self._timeout = aiohttp.ClientTimeout(total=timeout, connect=min(10.0, timeout))
        self._attempts = attempts
        self._sleep = sleep
        self._on_call = on_call

    async def close(self) -> None:
        await self._client.close()

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        try:
            return await self._call("GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.status == 404 and error.reason == "NotFound":
                return None
            raise

    async def list_children(self, kind: str, namespace: str, job: str) -> list[Object]:
        pages = self._pages(_path(kind, namespace), {"labelSelector": f"{JOB_LABEL}={job}"})
        return [item async for page in pages for item in page]

    async def list_labelled(self, kind: str, namespace: str, label: str) -> list[Object]:
        """Objects of the kind that carry `label`, written as `name=value`."""
        pages = self._pages(_path(kind, namespace), {"labelSelector": label})
        return [item async for page in pages for item in page]

    async def list_profiles(self) -> list[Object]:
        return [item async for page in self._pages(_path("FineTuneProfile", None), {}) for item in page]

    async def list_all(self, kind: str, namespaces: tuple[str, ...]) -> AsyncIterator[Object]:
        query = {} if kind == "FineTuneJob" else {"labelSelector": "=".join(MANAGED_BY)}
        for namespace in namespaces or (None,):
            async for page in self._pages(_path(kind, namespace), query):
                for item in page:
                    yield item

    async def create(self, manifest: Object) -> Object:
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        return await self._call("POST", path, {"fieldManager": FIELD_MANAGER}, manifest)

    async def replace(self, manifest: Object) -> Object:
        """ApiError's status is 409 where the object is not at the manifest's resourceVersion any more."""
        metadata = manifest["metadata"]
        path = _path(manifest["kind"], metadata.get("namespace"), metadata["name"])
        return await self._call("PUT", path, {"fieldManager": FIELD_MANAGER}, manifest)

    async def delete(self, kind: str, namespace: str, name: str, uid: str, resource_version: str | None = None) -> bool:
        preconditions = {"uid": uid} | ({"resourceVersion": resource_version} if resource_version else {})
        options = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": "Background",
            "preconditions": preconditions,
        }
        return await self._unless_gone(self._call("DELETE", _path(kind, namespace, name), {}, options)) is not None

    async def patch_status(
        self, namespace: str, name: str, uid: str, patch: Object, resource_version: str | None = None
    ) -> Object | None:
        # kube-apiserver looks at no UID in a patch of a custom resource's status, but it does look at the version, and
        # a later job of the same name never has that of an earlier one.
        version = {"resourceVersion": resource_version} if resource_version else {}
        body = {"metadata": {"uid": uid} | version, "status": patch}
        path = _path("FineTuneJob", namespace, name) + "/status"
        return await self._unless_gone(self._call("PATCH", path, {"fieldManager": FIELD_MANAGER}, body))

    async def patch_profile_status(self, name: str, patch: Object) -> bool:
        path = _path("FineTuneProfile", None, name) + "/status"
        call = self._call("PATCH", path, {"fieldManager": FIELD_MANAGER}, {"status": patch})
        return await self._unless_gone(call) is not None

    async def list_workloads(self, namespace: str, job_uid: str) -> list[Object] | None:
        try:
            # Kueue's versions come and go, and what is read of a Workload is the same in all of them.
            group = await self._call("GET", f"/apis/{KUEUE}")
            path = f"/apis/{group['preferredVersion']['groupVersion']}/namespaces/{namespace}/workloads"
            return [
                item async for page in self._pages(path, {"labelSelector": f"{JOB_UID}={job_uid}"}) for item in page
            ]
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def post_event(self, event: Object) -> None:
        namespace, name = event["metadata"]["namespace"], event["metadata"]["name"]
        try:
            await self.create(event)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            known = await self.get("Event", namespace, name) or event
            again = {"count": known.get("count", 1) + 1, "lastTimestamp": event["lastTimestamp"]}
            await self._call("PATCH", _path("Event", namespace, name), {"fieldManager": FIELD_MANAGER}, again)

    async def token_review(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": list(audiences)},
        }
        status = (await self._call("POST", _path("TokenReview", None), {}, review)).get("status", {})
        # A server that knows nothing of audiences answers without them: that is a refusal too.
        if not status.get("authenticated") or not set(audiences) & set(status.get("audiences") or ()):
            return None
        extra = status["user"].get("extra") or {}
        pod_name, pod_uid = (
            next(iter(extra.get(f"authentication.kubernetes.io/{key}") or ()), None) for key in ("pod-name", "pod-uid")
        )
        return TokenUser(status["user"].get("username", ""), pod_name, pod_uid)

    async def may(self, user: Mapping[str, Any], attributes: Object) -> bool:
        """Whether a user (authentication.k8s.io/v1 UserInfo) may do what these resourceAttributes say."""
        return await self._review(user, {"resourceAttributes": attributes})

    async def _review(self, user: Mapping[str, Any], attributes: Object) -> bool:
        spec: Object = {"user": user.get("username"), **attributes}
        spec |= {key: user[key] for key in ("uid", "groups", "extra") if user.get(key)}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        status = (await self._call("POST", _path("SubjectAccessReview", None), {}, review)).get("status", {})
        return bool(status.get("allowed"))

    async def authenticate(self, token: str) -> Object | None:
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        status = (await self._call("POST", _path("TokenReview", None), {}, review)).get("status", {})
        return status.get("user") if status.get("authenticated") else None

    async def may_get(self, user: Mapping[str, Any], url: str) -> bool:
        return await self._review(user, {"nonResourceAttributes": {"path": url, "verb": "get"}})

    async def get_pod(self, namespace: str, name: str) -> Object | None:
        return await self.get("Pod", namespace, name)

    async def get_job(self, namespace: str, name: str) -> Object | None:
        return await self.get("FineTuneJob", namespace, name)

    async def patch_trainer_status(
        self, namespace: str, name: str, uid: str, trainer_status: Object, resource_version: str | None = None
    ) -> bool:
        patch = {"trainerStatus": trainer_status}
        return await self.patch_status(namespace, name, uid, patch, resource_version) is not None

    async def _pages(self, path: str, query: dict[str, str]) -> AsyncIterator[list[Object]]:
        token = ""
        while True:
            page = await self._call("GET", path, query | {"limit": str(PAGE)} | ({"continue": token} if token else {}))
            if not isinstance(items := page.get("items") if isinstance(page, dict) else None, list):
                raise ApiError(0, "Unreadable", f"GET {path}: the answer is no list")
            yield items
            token = page.get("metadata", {}).get("continue") or ""
            if not token:
                return

    async def _unless_gone(self, call: Awaitable[Object]) -> Object | None:
        try:
            return await call
        except ApiError as error:
            if error.status in (404, 409):
                return None
            raise

    async def _call(
        self, method: Method, path: str, query: Mapping[str, str] | None = None, body: Object | None = None
    ) -> Object:
        """One request, again while the server says so: after Retry-After seconds where it names them."""
        for attempt in range(1, self._attempts + 1):
            code: int | str = "unreachable"
            start = time.monotonic()
            try:
                status, headers, data = await self._send(method, path, query, body)
                code = status
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                text = str(error) or type(error).__name__
                raise ApiError(0, "Unreachable", f"{method} {path}: {text}") from error
            finally:
                self._on_call(method, _resource(path), code, time.monotonic() - start)
            if status not in RETRIED or attempt == self._attempts:
                return self._result(method, path, status, data)
            await self._sleep(_delay(headers.get("Retry-After"), attempt))
        raise AssertionError("unreachable")

    async def _send(
        self, method: Method, path: str, query: Mapping[str, str] | None, body: Object | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        headers = {"Accept": "application/json", "User-Agent": FIELD_MANAGER}
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        url = self._host + path + (f"?{urlencode(query)}" if query else "")
        # The client's own part: bearer tokens that are refreshed from their file, client certificates, proxies.
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        response = await self._client.call_api(method, url, headers, body, _request_timeout=self._timeout)
        return response.status, response.headers, await response.read()

    def _result(self, method: Method, path: str, status: int, data: bytes) -> Object:
        try:
            answer = _parsed(data) if data else {}
        except ValueError as error:
            answer = {"message": data[:200].decode(errors="replace")}
            if 200 <= status < 300:
                raise ApiError(0, "Unreadable", f"{method} {path}: the answer is no JSON: {error}") from error
        if not 200 <= status < 300:
            told = answer if isinstance(answer, dict) else {"message": str(answer)}
            raise ApiError(status, told.get("reason") or str(status), f"{method} {path}: {told.get('message', '')}")
        return answer


def _parsed(data: bytes) -> Any:
    """Raises ValueError. An API server lets objects be nested ten times as deep as Python reads them by itself, and one
    such object must not make a whole LIST unreadable."""
    try:
        return json.loads(data)
    except RecursionError:
        usual = sys.getrecursionlimit()
        sys.setrecursionlimit(MAX_DEPTH)
        try:
            return json.loads(data)
        except RecursionError as error:
            raise ValueError(f"nested deeper than {MAX_DEPTH}") from error
        finally:
            sys.setrecursionlimit(usual)


def _path(kind: str, namespace: str | None, name: str | None = None) -> str:
    api, plural, namespaced = KINDS[kind]
    scope = f"/namespaces/{namespace}" if namespaced and namespace else ""
    return f"{api}{scope}/{plural}" + (f"/{name}" if name else "")


def _resource(path: str) -> str:
    """The plural in a path, for metrics."""
    return next((kind.plural for kind in KINDS.values() if f"/{kind.plural}" in path), "other")


def _delay(retry_after: str | None, attempt: int) -> float:
    """Seconds until the next try. Jitter keeps many operators and keys from coming back at once."""
    least = float(retry_after) if retry_after and retry_after.isdigit() else 0.25 * 2.0**attempt
    return min(least, 30.0) * random.uniform(1.0, 1.25)
