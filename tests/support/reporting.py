"""A FineTuneJob whose attempt has a real Job, a pod and its token, and a progress server before a real API server."""

import asyncio
import http.client
import json
import secrets
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.kube_config import load_kube_config

from finetune_api.crd import crds
from finetune_api.progress import audience
from finetune_operator.cluster import KubeCluster
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressOptions, ProgressServer
from support.api import Answer, Api, Object
from support.manifests import job_manifest
from support.waiting import eventually

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
STATUS = {"trainerStatus": {"progressPercentage": 1}}


async def install_crds(api: Api) -> None:
    for crd in crds():
        answer = await api.patch(f"{CRDS}/{crd['metadata']['name']}", crd, "apply", fieldManager="test", force="true")
        assert answer.status in (200, 201), answer.body
    path = "/apis/finetune.dev/v1alpha1/finetunejobs"
    await eventually(lambda: api.get(path), "FineTuneJobs to be served", until=lambda answer: answer.status == 200)


@dataclass(frozen=True)
class Attempt:
    """One attempt's Job and its pod, as the API server has them."""

    number: int
    job: Object
    pod: Object

    def entry(self, **more: Any) -> Object:
        metadata = self.job["metadata"]
        return {"number": self.number, "job": metadata["name"], "uid": metadata["uid"], **more}


@dataclass(frozen=True)
class Reporting:
    """A FineTuneJob in a namespace; no operator runs, so the test writes its status."""

    api: Api
    namespace: str
    name: str
    uid: str

    @classmethod
    async def create(cls, api: Api, namespace: str) -> "Reporting":
        name = f"bot-{secrets.token_hex(3)}"
        path = f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"
        made = (await api.create(path, job_manifest(name=name, namespace=namespace))).must(201)
        return cls(api, namespace, name, made["metadata"]["uid"])

    @property
    def path(self) -> str:
        """The path of its status, on the API server and on the progress server alike."""
        return f"/apis/finetune.dev/v1alpha1/namespaces/{self.namespace}/finetunejobs/{self.name}/status"

    async def status(self) -> Object:
        found: Object = (await self.api.get(self.path)).must(200).get("status", {})
        return found

    async def trainer_status(self) -> Object:
        found: Object = (await self.status()).get("trainerStatus") or {}
        return found

    async def set_status(self, **status: Any) -> None:
        (await self.api.patch(self.path, {"status": status})).must(200)

    async def attempt(self, number: int, label: str | None = None) -> Attempt:
        """Makes the Job of an attempt, and waits for the pod that the Job controller makes for it."""
        labels = {"finetune.dev/job-name": self.name, "finetune.dev/attempt": label or str(number)}
        pod = {
            "restartPolicy": "Never",
            "schedulerName": "nobody",
            "containers": [{"name": "trainer", "image": "example.com/trainer:1"}],
        }
        job = {
            "metadata": {"name": f"{self.name}-{number}"},
            "spec": {
                "completionMode": "Indexed",
                "completions": 1,
                "backoffLimit": 0,
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }
        made = (await self.api.create(f"/apis/batch/v1/namespaces/{self.namespace}/jobs", job)).must(201)
        pods = f"/api/v1/namespaces/{self.namespace}/pods"
        selector = f"batch.kubernetes.io/controller-uid={made['metadata']['uid']}"
        [pod] = await eventually(lambda: self.api.items(pods, labelSelector=selector), "pod of the Job")
        return Attempt(number, made, pod)

    async def token(self, pod: Object | None, audiences: tuple[str, ...] | None = None) -> str:
        """A token as it is projected into `pod`; None: one that is bound to no pod."""
        spec: Object = {"audiences": list(audiences or (audience(self.uid),)), "expirationSeconds": 600}
        if pod is not None:
            metadata = pod["metadata"]
            spec["boundObjectRef"] = {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": metadata["name"],
                "uid": metadata["uid"],
            }
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/default/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        token: str = (await self.api.create(path, body)).must(201)["status"]["token"]
        return token


@dataclass(frozen=True)
class Post:
    """Requests to a progress server, as a trainer sends them: with the standard library, one connection each."""

    port: int
    ca: Path

    async def __call__(
        self,
        path: str,
        token: str | None,
        body: Any = None,
        *,
        data: bytes | None = None,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        sent = {"Content-Type": "application/json", **(headers or {})}
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        data = data if data is not None else json.dumps(STATUS if body is None else body).encode()
        return await asyncio.to_thread(self._send, method, path, data, sent)

    def _send(self, method: str, path: str, data: bytes, headers: Mapping[str, str]) -> Answer:
        context = ssl.create_default_context(cafile=self.ca)
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=10, context=context)
        try:
            connection.request(method, path, data, dict(headers))
            response = connection.getresponse()
            return Answer(response.status, {**json.loads(response.read()), "headers": dict(response.headers)})
        finally:
            connection.close()


@asynccontextmanager
async def kube_cluster(kubeconfig: Path) -> AsyncIterator[KubeCluster]:
    configuration = Configuration()
    await load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
    cluster = KubeCluster(configuration)
    try:
        yield cluster
    finally:
        await cluster.close()


@asynccontextmanager
async def progress_server(cluster: Any, folder: Path, **options: Any) -> AsyncIterator[tuple[ProgressServer, Post]]:
    defaults = {"host": "127.0.0.1", "port": 0, "hosts": ("127.0.0.1",), "burst": 1000.0, "write_interval": 0.2}
    server = ProgressServer(cluster, ProgressOptions(tls_folder=folder, **{**defaults, **options}), Metrics())
    await server.start()
    try:
        yield server, Post(server.port, folder / "ca.crt")
    finally:
        await server.stop()
