"""The operator as a process before an API server: what it writes is counted on the way, and it can be killed there."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config.kube_config import load_kube_config

from finetune_api.failures import TerminationMessage
from finetune_operator.reconcile import utc_now
from support.api import Api, Object
from support.confined import Confinement
from support.manifests import job_manifest
from support.waiting import eventually
from support.world import PREPARED, RESULT, rfc3339

GROUP = "/apis/finetune.dev/v1alpha1"


@dataclass
class Proxy:
    """Forwards to the API server with an administrator's rights. Counts writes, Events and TokenReviews apart."""

    host: str
    headers: dict[str, str]
    session: aiohttp.ClientSession
    writes: list[str] = field(default_factory=list)
    kill_after: int | None = None
    victim: asyncio.subprocess.Process | None = None
    url: str = ""

    @classmethod
    @asynccontextmanager
    async def running(cls, kubeconfig: Path) -> AsyncIterator["Proxy"]:
        configuration = Configuration()
        await load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
        settings = (await configuration.auth_settings()).values()
        headers = {entry["key"]: entry["value"] for entry in settings if entry["in"] == "header"}
        connector = aiohttp.TCPConnector(ssl=RESTClientObject(configuration).ssl_context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            proxy = cls(configuration.host, headers, session)
            runner = web.ServerRunner(web.Server(proxy.forward, access_log=None), shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            proxy.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            try:
                yield proxy
            finally:
                await runner.cleanup()

    async def forward(self, request: web.BaseRequest) -> web.StreamResponse:
        # A compressed answer would be handed on without saying so: a real API server compresses long ones.
        hop = {"host", "authorization", "content-length", "transfer-encoding", "connection", "accept-encoding"}
        headers = {k: v for k, v in request.headers.items() if k.lower() not in hop} | self.headers
        headers["Accept-Encoding"] = "identity"
        url = self.host + request.path_qs
        async with self.session.request(
            request.method, url, headers=headers, data=await request.read() or None
        ) as answer:
            counted = request.method != "GET" and answer.status < 400
            if counted and not request.path.endswith("/tokenreviews") and "/events" not in request.path:
                self.writes.append(f"{request.method} {request.path}")
                if self.kill_after == len(self.writes) and self.victim:
                    self.victim.send_signal(signal.SIGKILL)
                    await self.victim.wait()
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            # What it passes on as it came: an API server compresses what is long.
            if "Content-Encoding" in answer.headers:
                response.headers["Content-Encoding"] = answer.headers["Content-Encoding"]
            with contextlib.suppress(ConnectionError):  # the operator hung up, or was killed
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            return response


@dataclass
class Operator:
    """`python -m finetune_operator` for one namespace; its log is kept."""

    directory: Path
    proxy: Proxy
    namespace: str
    process: asyncio.subprocess.Process | None = None
    confinement: Confinement | None = None
    """The memory cgroup that it is started in."""

    def environment(self, **settings: str) -> dict[str, str]:
        """Its variables; its kubeconfig is written."""
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.proxy.url}}],
            "users": [{"name": "test", "user": {"token": "unused"}}],
        }
        path = self.directory / "kubeconfig"
        path.write_text(json.dumps(kubeconfig))
        own = {"NAMESPACES": self.namespace, "TLS_FOLDER": str(self.directory / "tls"), **settings}
        return os.environ | {"KUBECONFIG": str(path)} | {f"FINETUNE_OPERATOR_{k}": v for k, v in own.items()}

    async def start(self, **settings: str) -> None:
        environment = self.environment(**settings)
        command: tuple[str, ...] = (sys.executable, "-m", "finetune_operator")
        if self.confinement:
            command = self.confinement.command(*command)
        with self.log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=output, stderr=output)
        self.proxy.victim = self.process

    @property
    def log(self) -> Path:
        return self.directory / "operator.log"

    async def stop(self) -> int:
        """Its exit code after SIGTERM."""
        assert self.process
        if self.process.returncode is None:
            self.process.terminate()
        try:
            return await asyncio.wait_for(self.process.wait(), 20)
        finally:
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()


@dataclass(frozen=True)
class Scene:
    """One namespace, one operator, and the test as kubelet."""

    api: Api
    namespace: str
    profile: str
    operator: Operator
    proxy: Proxy

    def path(self, kind: str, name: str = "", api: str = "/apis/batch/v1") -> str:
        return f"{api}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def job_path(self, name: str = "j") -> str:
        return self.path("finetunejobs", name, GROUP)

    async def submit(self, name: str = "j", **spec: Any) -> Object:
        manifest = job_manifest(name, self.namespace, **({"profile": self.profile} | spec))
        created: Object = (await self.api.create(self.path("finetunejobs", api=GROUP), manifest)).must(201)
        return created

    async def policy(self, name: str = "j", **members: Any) -> None:
        (await self.api.patch(self.job_path(name), {"spec": {"runPolicy": members}})).must(200)

    async def status(self, name: str = "j") -> Object:
        job = (await self.api.get(self.job_path(name))).must(200)
        status: Object = job.get("status") or {}
        return status

    async def reaches(self, state: str, name: str = "j", timeout: float = 30.0) -> Object:
        """The status once it is in this state."""
        return await eventually(
            lambda: self.status(name), f"state {state}", until=lambda s: s.get("state") == state, timeout=timeout
        )

    async def jobs(self) -> list[str]:
        return sorted(job["metadata"]["name"] for job in await self.api.items(self.path("jobs")))

    async def pods(self, job: str, count: int = 1) -> list[Object]:
        """The Job's live pods, by worker, once there are that many; not those of an earlier Job of the name."""

        async def live() -> list[Object]:
            owner = await self.api.get(self.path("jobs", job))
            if owner.status == 404:
                return []
            found = await self.api.items(
                self.path("pods", api="/api/v1"),
                labelSelector=f"batch.kubernetes.io/controller-uid={owner.must(200)['metadata']['uid']}",
            )
            over = ("Succeeded", "Failed")
            return [p for p in found if "deletionTimestamp" not in p["metadata"] and p["status"]["phase"] not in over]

        pods = await eventually(live, f"{count} pods of {job}", until=lambda found: len(found) == count, timeout=40)
        index = "batch.kubernetes.io/job-completion-index"
        return sorted(pods, key=lambda pod: int(pod["metadata"]["annotations"][index]))

    async def report(self, pod: Object, phase: str, state: Object) -> None:
        """A pod's status as its kubelet would tell it."""
        container = {"name": "trainer", "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": state}
        path = self.path("pods", pod["metadata"]["name"], "/api/v1") + "/status"
        body = {"status": {"phase": phase, "containerStatuses": [container]}}
        (await self.api.patch(path, body, "merge")).must(200)

    async def run(self, job: str, workers: int = 1) -> None:
        for pod in await self.pods(job, workers):
            await self.report(pod, "Running", {"running": {"startedAt": rfc3339(utc_now())}})

    async def end(
        self, job: str, *, index: int = 0, workers: int = 1, message: TerminationMessage, code: int = 0
    ) -> None:
        pod = (await self.pods(job, workers))[index]
        now = rfc3339(utc_now())
        text = message.encode().decode()
        ended = {"exitCode": code, "startedAt": now, "finishedAt": now, "reason": "Completed", "message": text}
        await self.report(pod, "Failed" if code else "Succeeded", {"terminated": ended})

    async def prepared(self) -> None:
        """`prepare` runs and succeeds."""
        await self.reaches("Preparing")
        await self.end("j-prepare", message=TerminationMessage(prepared=PREPARED))

    async def completed(self, job: str, workers: int = 1) -> None:
        pods = await self.pods(job, workers)
        for index in reversed(range(len(pods))):
            told = TerminationMessage(result=RESULT if index == 0 else None)
            now = rfc3339(utc_now())
            ended = {"exitCode": 0, "startedAt": now, "finishedAt": now, "message": told.encode().decode()}
            await self.report(pods[index], "Succeeded", {"terminated": ended})
