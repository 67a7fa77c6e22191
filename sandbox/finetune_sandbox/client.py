"""A thin asynchronous client for any Kubernetes API server: plain dicts in, plain dicts out.

The kubeconfig (certificates, tokens, exec plugins) is read by `kubernetes.aio`; requests and watches are plain
aiohttp, because the node and the controllers here handle whole objects and need no typed models.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config.kube_config import load_kube_config

log = logging.getLogger(__name__)

Object = dict[str, Any]

MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_PATCH = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"


@dataclass(frozen=True)
class Resource:
    """Where a kind lives: `base` is `/api/v1` or `/apis/<group>/<version>`."""

    base: str
    plural: str
    kind: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        parts = [self.base]
        if self.namespaced and namespace:
            parts.append(f"namespaces/{namespace}")
        parts.append(self.plural)
        parts.extend(part for part in (name, subresource) if part)
        return "/".join(parts)

    @property
    def api_version(self) -> str:
        return self.base.removeprefix("/apis/").removeprefix("/api/")


PODS = Resource("/api/v1", "pods", "Pod")
NODES = Resource("/api/v1", "nodes", "Node", namespaced=False)
NAMESPACES = Resource("/api/v1", "namespaces", "Namespace", namespaced=False)
SECRETS = Resource("/api/v1", "secrets", "Secret")
CONFIGMAPS = Resource("/api/v1", "configmaps", "ConfigMap")
SERVICE_ACCOUNTS = Resource("/api/v1", "serviceaccounts", "ServiceAccount")
EVENTS = Resource("/api/v1", "events", "Event")
LEASES = Resource("/apis/coordination.k8s.io/v1", "leases", "Lease")
JOBS = Resource("/apis/batch/v1", "jobs", "Job")


class ApiError(Exception):
    """An answer of the API server with a status of 400 or more."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        self.status = status
        self.reason = str(body.get("reason") or "")
        self.message = str(body.get("message") or "")
        self.details: Mapping[str, Any] = body.get("details") or {}
        super().__init__(f"{status} {self.reason}: {self.message}")


class Expired(ApiError):
    """The resourceVersion to watch from is gone (410): list again."""


@dataclass(frozen=True)
class Change:
    """One change of one object; `type` is ADDED, MODIFIED, DELETED, or SYNCED after each full list (object empty)."""

    type: str
    object: Object


class Client:
    """One connection pool to one API server. Close it, or use it as an async context manager."""

    def __init__(self, configuration: Configuration, source: str, acting: Mapping[str, str] | None = None) -> None:
        self._configuration = configuration
        self._acting = dict(acting or {})
        self._ssl = RESTClientObject(configuration).ssl_context
        self.host = str(configuration.host)
        self.source = source
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=self._ssl))

    @classmethod
    async def from_kubeconfig(cls, path: Path | str | None = None, context: str | None = None) -> Client:
        """Raises kubernetes' ConfigException where the file names no usable cluster."""
        configuration: Configuration = type.__call__(
            Configuration
        )  # a new one: the constructor copies a global default
        await load_kube_config(
            config_file=str(path) if path else None,
            context=context,
            client_configuration=configuration,
            persist_config=False,
        )
        return cls(configuration, str(path or ""))

    def acting_as(self, name: str, group: str = "") -> Client:
        """A client of the same server for another user, whom this one's must be allowed to impersonate."""
        headers = {"Impersonate-User": name} | ({"Impersonate-Group": group} if group else {})
        return Client(self._configuration, self.source, headers)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def _headers(self) -> dict[str, str]:
        settings = await self._configuration.auth_settings()
        return {
            str(entry["key"]): str(entry["value"])
            for entry in settings.values()
            if entry["in"] == "header" and entry["value"]
        } | self._acting

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        timeout: float = 30.0,
    ) -> Object:
        """One call; the decoded answer. Raises ApiError, aiohttp.ClientError or TimeoutError."""
        headers = await self._headers()
        data = None
        if body is not None:
            headers["Content-Type"] = content_type
            data = json.dumps(body)
        async with self._session.request(
            method,
            self.host + path,
            params=params,
            data=data,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout),
        ) as response:
            answer = _decode(await response.read())
            if response.status >= 400:
                raise (Expired if response.status == 410 else ApiError)(response.status, answer)
            return answer

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        return await self.request("GET", resource.path(namespace, name))

    async def list(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Object], str]:
        """All items (paged in chunks of 500) and the resourceVersion to watch from."""
        items: list[Object] = []
        params = {"limit": "500"} | _selectors(labels, fields)
        while True:
            answer = await self.request("GET", resource.path(namespace), params=params)
            items.extend(answer.get("items") or [])
            metadata = answer.get("metadata") or {}
            if not metadata.get("continue"):
                return items, str(metadata.get("resourceVersion") or "")
            params = params | {"continue": str(metadata["continue"])}

    async def create(
        self, resource: Resource, namespace: str | None, body: Object, subresource: str | None = None, name: str = ""
    ) -> Object:
        return await self.request("POST", resource.path(namespace, name or None, subresource), body=body)

    async def replace(
        self, resource: Resource, namespace: str | None, name: str, body: Object, subresource: str | None = None
    ) -> Object:
        return await self.request("PUT", resource.path(namespace, name, subresource), body=body)

    async def patch(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Any,
        subresource: str | None = None,
        content_type: str = MERGE_PATCH,
    ) -> Object:
        path = resource.path(namespace, name, subresource)
        return await self.request("PATCH", path, body=body, content_type=content_type)

    async def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        uid: str = "",
        grace_seconds: int | None = None,
        propagation: str = "",
    ) -> None:
        """Deletes; that the object is gone already (404), or is another one by that name (409), is no error."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        if propagation:
            options["propagationPolicy"] = propagation
        try:
            await self.request("DELETE", resource.path(namespace, name), body=options)
        except ApiError as error:
            if error.status != 404 and not (error.status == 409 and uid):
                raise

    async def changes(
        self, resource: Resource, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> AsyncGenerator[Change, None]:
        """Lists, then watches, for ever: every object as it is and as it changes.

        After a 410 or a broken connection it lists again, and what is gone since is reported as DELETED with its last
        known state. SYNCED follows each list.
        """
        known: dict[tuple[str, str], Object] = {}
        delay = 0.0
        while True:
            try:
                items, version = await self.list(resource, namespace, labels=labels, fields=fields)
                present = {_uid_key(item) for item in items}
                for key in [key for key in known if key not in present]:
                    yield Change("DELETED", known.pop(key))
                for item in items:
                    key = _uid_key(item)
                    yield Change("MODIFIED" if key in known else "ADDED", item)
                    known[key] = item
                yield Change("SYNCED", {})
                delay = 0.0
                async with aclosing(self._watch(resource, namespace, version, labels, fields)) as events:
                    async for change in events:
                        if change.type == "DELETED":
                            known.pop(_uid_key(change.object), None)
                        else:
                            known[_uid_key(change.object)] = change.object
                        yield change
            except Expired:
                log.info("watch of %s: resourceVersion expired, listing again", resource.plural)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("watch of %s at %s failed (%s), trying again", resource.plural, self.host, error)
                delay = min(max(delay * 2, 0.2), 10.0)
                await asyncio.sleep(
                    delay * random.uniform(0.8, 1.2)
                )  # back-off, so that a server that starts can start

    async def _watch(
        self, resource: Resource, namespace: str | None, version: str, labels: str, fields: str
    ) -> AsyncGenerator[Change, None]:
        """Watches from `version`, reconnecting from the last version seen, until the server says 410."""
        while True:
            params = _selectors(labels, fields) | {
                "watch": "true",
                "resourceVersion": version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(random.randint(240, 480)),
            }
            async with self._session.get(
                self.host + resource.path(namespace),
                params=params,
                headers=await self._headers(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=600),
            ) as response:
                if response.status >= 400:
                    answer = _decode(await response.read())
                    raise (Expired if response.status == 410 else ApiError)(response.status, answer)
                async for line in _lines(response.content):
                    event = json.loads(line)
                    item = event["object"]
                    if event["type"] == "ERROR":
                        code = int(item.get("code") or 500)
                        raise (Expired if code == 410 else ApiError)(code, item)
                    version = item["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        yield Change(event["type"], item)


async def until_done(call: Callable[[], Awaitable[object]], what: str, given_up: Callable[[], bool]) -> bool:
    """Repeats a write about one object until it is done (True), or its object is gone or `given_up()` (False)."""
    delay = 0.1
    while not given_up():
        try:
            await call()
            return True
        except ApiError as error:
            if error.status == 404 or (error.status == 409 and "uid" in error.message.lower()):
                return False
            problem: Exception = error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            problem = error
        log.warning("%s: %s; trying again", what, problem)
        await asyncio.sleep(delay)
        delay = min(delay * 2, 5.0)
    return False


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length (aiohttp's own readline refuses long ones)."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line


def _decode(raw: bytes) -> Object:
    try:
        answer = json.loads(raw) if raw else {}
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"message": raw[:500].decode(errors="replace")}


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return {key: value for key, value in (("labelSelector", labels), ("fieldSelector", fields)) if value}


def _uid_key(item: Object) -> tuple[str, str]:
    metadata = item["metadata"]
    return str(metadata.get("namespace") or ""), str(metadata.get("uid") or metadata["name"])


def event_body(
    involved: Object, resource: Resource, *, type: str, reason: str, message: str, component: str, host: str, now: str
) -> Object:
    """A core/v1 Event about `involved`, as kubelets and controllers write them."""
    metadata = involved["metadata"]
    namespace = metadata.get("namespace") or "default"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name'][:200]}.", "namespace": namespace},
        "involvedObject": {
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "name": metadata["name"],
            "namespace": metadata.get("namespace", ""),
            "uid": metadata.get("uid", ""),
        },
        "type": type,
        "reason": reason,
        "message": message[:1024],
        "source": {"component": component, "host": host},
        "reportingComponent": component,
        "reportingInstance": host,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }


class Recorder:
    """Writes Events; one that cannot be written is logged, since nothing may depend on it."""

    def __init__(self, client: Client, component: str, host: str, now: Callable[[], str]) -> None:
        self._client = client
        self._component = component
        self._host = host
        self._now = now

    async def event(self, involved: Object, resource: Resource, type: str, reason: str, message: str) -> None:
        body = event_body(
            involved,
            resource,
            type=type,
            reason=reason,
            message=message,
            component=self._component,
            host=self._host,
            now=self._now(),
        )
        try:
            await self._client.create(EVENTS, body["metadata"]["namespace"], body)
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            log.warning("event %s for %s was not recorded: %s", reason, involved["metadata"]["name"], error)
