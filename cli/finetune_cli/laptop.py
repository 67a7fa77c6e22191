"""A whole cluster for the laptop: the sandbox, the operator as a process of its own, and what a first job needs.

The command line does not import the operator: it starts `python -m finetune_operator` as anybody would.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api import crd
from finetune_api.profile import DEFAULT_ANNOTATION
from finetune_cli import cluster as clusters
from finetune_cli.cluster import PROFILES, Cluster, Target
from finetune_cli.errors import CliError, Exit
from finetune_cli.objectstore import Access, Store
from finetune_sandbox import up
from finetune_sandbox.client import SECRETS, ApiError, Object, Resource
from finetune_sandbox.up import SandboxError, SandboxInfo

BUCKET = "finetune"
SECRET = "s3-creds"
NAMESPACE = "default"
PROFILE = "laptop"
IMAGE = "finetune-trainer:sandbox"
CRDS = Resource("/apis/apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition", False)
READY_SECONDS, STOP_SECONDS = 60.0, 15.0


def start(directory: Path) -> SandboxInfo:
    """The sandbox of `directory`, with the operator in it; what runs already is kept. Raises CliError."""
    operator = Operator(directory.resolve())
    if up.running(directory) is None:
        operator.stop()  # one that was left behind by a sandbox that was killed
    try:
        info = up.start_background(directory)
    except (SandboxError, ModuleNotFoundError, OSError) as error:
        raise CliError(_why_not(error)) from error
    clusters.run(Target(info.kubeconfig), lambda cluster: provision(cluster, info))
    if operator.process is None:
        operator.start(info)
    return info


def stop(directory: Path) -> bool:
    """Stops operator and sandbox; False where nothing ran."""
    stopped = Operator(directory.resolve()).stop()
    try:
        return up.stop_background(directory) or stopped
    except SandboxError as error:
        raise CliError(str(error)) from error


def running(directory: Path) -> SandboxInfo:
    info = up.running(directory)
    if info is None:
        raise CliError(f"no sandbox runs in {directory}: `finetune sandbox up` starts one", Exit.UNREACHABLE)
    return info


def store(info: SandboxInfo) -> Store:
    """The sandbox's S3, with an administrator's rights."""
    keys = info.credentials()
    return Store(
        Access(info.s3_endpoint, info.s3_region, keys.access_key_id, keys.secret_access_key, addressing_style="path")
    )


async def provision(cluster: Cluster, info: SandboxInfo) -> None:
    """CRDs, the default profile, a bucket, and a Secret with keys for that bucket alone."""
    for definition in crd.crds():
        await cluster.apply(CRDS, definition)
    for definition in crd.crds():
        await established(cluster, definition["metadata"]["name"])
    await cluster.apply(PROFILES, profile(info))
    try:
        await cluster.get(SECRETS, NAMESPACE, SECRET)
    except ApiError as error:
        if error.status != 404:
            raise
        admin = info.s3()
        admin.create_bucket(BUCKET)
        await cluster.apply(SECRETS, secret(admin.create_user("tenant", [BUCKET])))


async def established(cluster: Cluster, name: str) -> None:
    """Waits until the server serves a CRD."""
    async with aclosing(cluster.changes(CRDS, fields=f"metadata.name={name}")) as changes:
        async for change in changes:
            conditions = (change.object.get("status") or {}).get("conditions") or ()
            if any(c["type"] == "Established" and c["status"] == "True" for c in conditions):
                return


def profile(info: SandboxInfo) -> Object:
    return {
        "apiVersion": PROFILES.api_version,
        "kind": PROFILES.kind,
        "metadata": {"name": PROFILE, "annotations": {DEFAULT_ANNOTATION: "true"}},
        "spec": {
            "image": IMAGE,
            "resources": {"cpu": "500m", "memory": "3Gi", "shm": "64Mi"},
            "prepare": {"cpu": "500m", "memory": "2Gi"},
            "terminationGracePeriodSeconds": 30,
            "storage": {"endpoint": info.s3_endpoint, "region": info.s3_region, "addressingStyle": "path"},
        },
    }


def secret(keys: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": SECRET, "namespace": NAMESPACE},
        "type": "Opaque",
        "stringData": {"AWS_ACCESS_KEY_ID": keys.access_key_id, "AWS_SECRET_ACCESS_KEY": keys.secret_access_key},
    }


def _why_not(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the sandbox needs {error.name}: pip install 'finetune-operator[sandbox,trainer]'"
    return str(error)


@dataclass(frozen=True)
class Operator:
    """The operator's process: its log and its number are kept in the sandbox's folder."""

    directory: Path

    @property
    def log(self) -> Path:
        return self.directory / "operator.log"

    @property
    def _record(self) -> Path:
        return self.directory / "operator.json"

    def start(self, info: SandboxInfo) -> None:
        """Starts it and waits until its liveness server says that it is ready. Raises CliError with its last words."""
        port = _free_port()
        settings = {
            "FINETUNE_OPERATOR_LIVENESS_PORT": str(port),
            "FINETUNE_OPERATOR_TLS_FOLDER": str(self.directory / "tls"),
            "FINETUNE_OPERATOR_LOG_FORMAT": "plain",
        }
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("FINETUNE_OPERATOR_", "KUBERNETES_"))}
        with self.log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "finetune_operator"],
                env=outside | settings | {"KUBECONFIG": info.kubeconfig},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._record.write_text(json.dumps({"pid": process.pid, "started": _started(process.pid)}))
        deadline = time.monotonic() + READY_SECONDS
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                words = "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
                raise CliError(f"the operator did not start; the end of {self.log}:\n{words}")
            time.sleep(0.05)
        process.returncode = 0  # it is to outlive us: not a child that was forgotten

    def stop(self) -> bool:
        """SIGTERM, after some seconds SIGKILL; False where it did not run."""
        pid = self.process
        if pid is None:
            return False
        process = os.pidfd_open(pid)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(process, number)
                deadline = time.monotonic() + STOP_SECONDS
                while time.monotonic() < deadline:
                    if self.process is None:
                        self._record.unlink(missing_ok=True)
                        return True
                    time.sleep(0.05)
        except ProcessLookupError:
            return True
        finally:
            os.close(process)
        raise CliError(f"the operator (process {pid}) does not end")

    @property
    def process(self) -> int | None:
        """Its number where it lives: a number alone may be another's by now, with the start time it is not."""
        try:
            known = json.loads(self._record.read_text())
        except (FileNotFoundError, ValueError):
            return None
        started = _started(known["pid"])
        return known["pid"] if started is not None and started == known["started"] else None


def _started(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot; None where it does not live (any more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:  # not there yet, or it says 500
        return False
