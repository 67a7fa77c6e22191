"""A bare client for tests: every status code and body as the server sent it, nothing retried, nothing hidden."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config.kube_config import load_kube_config

Object = dict[str, Any]

PATCHES = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",
}


def idle_pod(name: str) -> Object:
    """A pod that no node will run: nothing binds it to one."""
    spec = {"schedulerName": "nobody", "containers": [{"name": "main", "image": "example.com/image:1"}]}
    return {"metadata": {"name": name}, "spec": spec}


@dataclass(frozen=True)
class Answer:
    """A status code and the decoded body."""

    status: int
    body: Any

    def must(self, status: int) -> Any:
        """The body, where the status is the expected one."""
        assert self.status == status, f"expected {status}, got {self.status}: {json.dumps(self.body)[:2000]}"
        return self.body

    def refused(self, status: int, reason: str) -> str:
        """The message of a metav1.Status with this code and reason."""
        body = self.must(status)
        assert body["kind"] == "Status", body
        assert body["status"] == "Failure", body
        assert body["code"] == status, body
        assert body["reason"] == reason, body
        return str(body["message"])


class Api:
    """One connection pool to one API server."""

    def __init__(self, session: aiohttp.ClientSession, host: str, headers: Mapping[str, str]) -> None:
        self._session = session
        self._host = host
        self._headers = dict(headers)

    @classmethod
    @asynccontextmanager
    async def connect(cls, kubeconfig: Path) -> AsyncIterator["Api"]:
        configuration = Configuration()
        await load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
        settings = (await configuration.auth_settings()).values()
        headers = {entry["key"]: entry["value"] for entry in settings if entry["in"] == "header"}
        trust = RESTClientObject(configuration).ssl_context
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session:
            yield cls(session, configuration.host, headers)

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        data: bytes | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        token: str | None = None,
        acting: str | None = None,
        group: str | None = None,
        **params: Any,
    ) -> Answer:
        """One request; `body` is sent as JSON, `data` as it is; `token` instead of the kubeconfig's credentials;
        `acting`: as this user, of this group."""
        headers = {**self._headers, "Accept": accept}
        if acting is not None:
            headers["Impersonate-User"] = acting
        if group is not None:
            headers["Impersonate-Group"] = group
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if body is not None:
            data = json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = content_type
        async with self._session.request(
            method,
            self._host + path,
            headers=headers,
            data=data,
            params={key: str(value) for key, value in params.items()},
            timeout=aiohttp.ClientTimeout(total=30),
        ) as response:
            text = await response.text()
        try:
            return Answer(response.status, json.loads(text))
        except ValueError:
            return Answer(response.status, text)

    async def get(self, path: str, **params: Any) -> Answer:
        return await self.call("GET", path, **params)

    async def items(self, path: str, **params: Any) -> list[Object]:
        items: list[Object] = (await self.get(path, **params)).must(200)["items"]
        return items

    async def create(self, path: str, body: Object, **params: Any) -> Answer:
        return await self.call("POST", path, body=body, **params)

    async def replace(self, path: str, body: Object, **params: Any) -> Answer:
        return await self.call("PUT", path, body=body, **params)

    async def patch(self, path: str, body: Any, kind: str = "merge", **params: Any) -> Answer:
        return await self.call("PATCH", path, body=body, content_type=PATCHES[kind], **params)

    async def delete(self, path: str, body: Object | None = None, **params: Any) -> Answer:
        return await self.call("DELETE", path, body=body, **params)

    @asynccontextmanager
    async def watch(self, path: str, **params: Any) -> AsyncIterator["Watch"]:
        query = {"watch": "true", **{key: str(value) for key, value in params.items()}}
        timeout = aiohttp.ClientTimeout(total=60)
        async with self._session.get(
            self._host + path, headers=self._headers, params=query, timeout=timeout
        ) as response:
            yield Watch(response)


class Watch:
    """An open watch; `status` is the HTTP status of its answer."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self._content = response.content

    async def next(self, timeout: float = 10.0) -> Object:
        """The next event; TimeoutError where there is none in time."""
        line = await asyncio.wait_for(self._content.readline(), timeout)
        assert line, "the server ended the watch"
        event: Object = json.loads(line)
        return event

    async def rest(self) -> list[Object]:
        """Every event until the server ends the watch."""
        return [json.loads(line) async for line in self._content]
