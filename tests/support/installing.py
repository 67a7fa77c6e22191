"""A release of the chart on an API server, by Helm itself; the test is its kubelet and its network.

What a Job or a Deployment of the chart says is run as a process here, with a token of its own ServiceAccount.
"""

import asyncio
import base64
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import yaml
from helm_python.config import Config

from support.api import Api, Object
from support.charting import CHART, NAMESPACE, RELEASE
from support.rights import token_of
from support.s3 import unused_port
from support.waiting import eventually

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

MOUNTS = "/etc/finetune-operator"
JOBS, PODS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs", f"/api/v1/namespaces/{NAMESPACE}/pods"


@dataclass
class Replica:
    """A pod of the operator as a process."""

    process: asyncio.subprocess.Process
    log: Path
    health: int
    """The port of its probes."""

    async def ready(self) -> bool:
        """As its readiness probe sees it."""
        assert self.process.returncode is None, self.log.read_text()[-3000:]
        try:
            async with aiohttp.request("GET", f"http://127.0.0.1:{self.health}/healthz") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), 20)
        finally:
            if self.process.returncode is None:
                self.process.kill()


@dataclass
class Release:
    """`install` it, let its Job and its replicas run, `upgrade` and `uninstall` it."""

    cluster: "Sandbox"
    api: Api
    folder: Path
    webhook_port: int = field(default_factory=unused_port)
    replicas: list[Replica] = field(default_factory=list)

    def values(self, **more: Any) -> Object:
        return {"admission": {"webhook": {"port": self.webhook_port}}, "logLevel": "INFO", **more}

    async def install(self, chart: Path, **values: Any) -> None:
        await self._helm("install", chart, RELEASE, self.values(**values), create_namespace=True)

    async def upgrade(self, **values: Any) -> None:
        await self._helm("upgrade", CHART, RELEASE, self.values(**values))

    async def uninstall(self) -> None:
        await self._helm("uninstall", RELEASE)

    async def _helm(self, action: str, *given: Any, **options: Any) -> None:
        def act() -> None:
            with Config(kubeconfig_path=self.cluster.kubeconfig, namespace=NAMESPACE) as config:
                getattr(config, action)(*given, **options, timeout=60)

        await asyncio.to_thread(act)

    async def certificates(self) -> None:
        """The release's newest Job of certificates ends as its program does."""
        pod = await eventually(self._waiting_pod, "a pod of the certificates' Job", timeout=30)
        (container,) = pod["spec"]["containers"]
        account = pod["spec"]["serviceAccountName"]
        command = [sys.executable, *container["command"][1:], *container["args"]]
        process = await asyncio.create_subprocess_exec(
            *command, env=await self._environment(account, {}), stderr=asyncio.subprocess.PIPE
        )
        _, said = await process.communicate()
        assert process.returncode == 0, said.decode()
        state = {"terminated": {"exitCode": 0, "reason": "Completed"}}
        status = {"phase": "Succeeded", "containerStatuses": [_status(container["name"], state)]}
        (await self.api.patch(f"{PODS}/{pod['metadata']['name']}/status", {"status": status}, "merge")).must(200)

    async def _waiting_pod(self) -> Object | None:
        found = await self.api.items(PODS, labelSelector="app.kubernetes.io/name=finetune-certificates")
        return next((pod for pod in found if pod["status"].get("phase") == "Pending"), None)

    async def secret(self, name: str = f"{RELEASE}-tls") -> dict[str, str]:
        """The files of a Secret of the release; by default the certificate's."""
        path = f"/api/v1/namespaces/{NAMESPACE}/secrets/{name}"
        data = (await self.api.get(path)).must(200)["data"]
        return {name: base64.b64decode(value).decode() for name, value in data.items()}

    async def connect(self) -> None:
        """The network of Services: the webhook's leads to the first replica."""
        path = f"/api/v1/namespaces/{NAMESPACE}/services/{RELEASE}-webhook"
        spec = {"type": "ExternalName", "externalName": "localhost", "clusterIP": None, "clusterIPs": None}
        (await self.api.patch(path, {"spec": spec})).must(200)

    async def roll(self, replicas: int) -> None:
        """As the Deployment's controller would: new pods, ready, and then none of the old ones."""
        old, self.replicas = self.replicas, []
        path = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{RELEASE}"
        pod = (await self.api.get(path)).must(200)["spec"]["template"]["spec"]
        # A port of this machine is free for the next only when the one before is gone.
        for replica in old[1:]:
            await replica.stop()
        for number in range(1, replicas):
            self.replicas.append(await self._start(pod, number, unused_port()))
        for replica in old[:1]:
            await replica.stop()
        self.replicas.insert(0, await self._start(pod, 0, self.webhook_port))
        for replica in self.replicas:
            await eventually(replica.ready, "a replica that is ready", timeout=60)

    async def stop(self) -> None:
        for replica in self.replicas:
            await replica.stop()
        self.replicas = []

    async def _start(self, pod: Object, number: int, webhook_port: int) -> Replica:
        (container,) = pod["containers"]
        folder = self.folder / f"replica-{number}"
        await self._mount(pod, folder)
        health = unused_port()
        # An API server leaves an empty value out.
        given = {e["name"]: f"replica-{number}" if "valueFrom" in e else e.get("value", "") for e in container["env"]}
        given = {name: value.replace(MOUNTS, str(folder)) for name, value in given.items()}
        own = given | {
            "FINETUNE_OPERATOR_ADMISSION_PORT": str(webhook_port),
            "FINETUNE_OPERATOR_PROGRESS_PORT": str(unused_port()),
            "FINETUNE_OPERATOR_METRICS_PORT": str(unused_port()),
            "FINETUNE_OPERATOR_LIVENESS_PORT": str(health),
            "FINETUNE_OPERATOR_LEASE_SECONDS": "2",
            **{
                f"FINETUNE_OPERATOR_{name}_HOST": "127.0.0.1"
                for name in ("ADMISSION", "PROGRESS", "METRICS", "LIVENESS")
            },
        }
        environment = await self._environment(pod["serviceAccountName"], own)
        log = self.folder / f"replica-{number}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *container["command"][1:], env=environment, stdout=output, stderr=output
            )
        return Replica(process, log, health)

    async def _mount(self, pod: Object, folder: Path) -> None:
        """The pod's Secrets as files, of each no more than its items."""

        def write(place: Path, files: Mapping[str, str]) -> None:
            place.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (place / name).write_text(text)

        (container,) = pod["containers"]
        places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        for volume in pod["volumes"]:
            if wanted := volume.get("secret"):
                files = await self.secret(wanted["secretName"])
                place = Path(places[volume["name"]].replace(MOUNTS, str(folder)))
                write(place, {item["path"]: files[item["key"]] for item in wanted["items"]})

    async def _environment(self, account: str, own: Mapping[str, str]) -> dict[str, str]:
        kubeconfig = yaml.safe_load(self.cluster.kubeconfig.read_text())
        for user in kubeconfig["users"]:
            user["user"] = {"token": await token_of(self.api, NAMESPACE, account)}
        path = self.folder / f"{account}.kubeconfig"
        path.write_text(json.dumps(kubeconfig))
        return os.environ | own | {"KUBECONFIG": str(path), "HOME": str(self.folder)}


def _status(name: str, state: Object) -> Object:
    return {"name": name, "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": state}
