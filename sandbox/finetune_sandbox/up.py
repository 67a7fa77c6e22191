"""A whole cluster on this machine: API server, controllers, scheduler, process node and S3.

`Sandbox` runs it in the caller's event loop; `serve`, `start_background` and `stop_background` are what the command
line calls. Where `$KUBEBUILDER_ASSETS` is set, the control plane is the real one of that folder. Everything ends with
the process that started it, the pods' processes included, even if that is killed.
"""

from __future__ import annotations

import asyncio
import configparser
import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from finetune_sandbox import identities
from finetune_sandbox.binder import Binder
from finetune_sandbox.client import Client, Resource
from finetune_sandbox.controlplane import ControlPlane, assets_from_environment
from finetune_sandbox.jobs import JobController
from finetune_sandbox.logformat import configure_logging
from finetune_sandbox.logs import NodeLogs
from finetune_sandbox.node import Node
from finetune_sandbox.s3 import S3, Credentials
from finetune_sandbox.tasks import until_signal

if TYPE_CHECKING:
    from finetune_sandbox.server import ApiServer

log = logging.getLogger(__name__)

NODE_NAME = "sandbox"
_START_SECONDS, _STOP_SECONDS, _LOCK_SECONDS = 120.0, 20.0, 2.0
_POLL_SECONDS = 0.05
_INFO, _LOCK, _LOG, _CREDENTIALS = "sandbox.json", "sandbox.lock", "sandbox.log", "s3.credentials"


class SandboxError(RuntimeError):
    """The sandbox did not start or stop; the message says why, with the last log lines where there are some."""


class Sandbox:
    """A cluster in this process. `async with Sandbox(directory) as sandbox`, or `start()` and `stop()`.

    After the start: `name` ("sandbox", or "kubernetes" for a real control plane), `kubeconfig` (an administrator's),
    `node` (and with it a scheduler) and `s3`, which are None where they were not wanted. `node_options` are fields of
    host.Host.
    """

    kubeconfig: Path
    client: Client

    def __init__(
        self,
        directory: Path,
        *,
        assets: Path | None = None,
        node: bool = True,
        s3: bool = True,
        resources: Mapping[str, str] | None = None,
        **node_options: Any,
    ) -> None:
        self._directory = directory
        self._assets = assets or assets_from_environment()
        self.name = "kubernetes" if self._assets else "sandbox"
        self._wants_node, self._wants_s3 = node, s3
        self._resources = resources or {}
        self._node_options = node_options
        self._stack = AsyncExitStack()
        self.node: Node | None = None
        self.s3: S3 | None = None

    async def __aenter__(self) -> Sandbox:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns when pods can be created. What was started is stopped again on failure."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stops everything, the last started first. Safe to call twice."""
        await self._stack.aclose()

    async def _start(self) -> None:
        s3 = asyncio.create_task(S3.start(self._directory / "s3")) if self._wants_s3 else None
        try:
            server = await self._start_control_plane()
        finally:
            if s3:
                self.s3 = await s3
                self._stack.push_async_callback(self.s3.stop)
        self.client = await self._stack.enter_async_context(await Client.from_kubeconfig(self.kubeconfig))
        if server:
            jobs = JobController(await self._acting_as(identities.JOB_CONTROLLER.name))
            jobs.start()
            self._stack.push_async_callback(jobs.close)
            server.log_source = NodeLogs(self.client)
        if self._wants_node:
            kubelet = identities.node(NODE_NAME)
            await self._grant(f"sandbox:node:{NODE_NAME}", identities.NODE_RULES, kubelet.name)
            binder = Binder(await self._acting_as(identities.SCHEDULER.name))
            binder.start()
            self._stack.push_async_callback(binder.close)
            folder = self._directory / "node"
            own = await self._acting_as(kubelet.name, identities.NODES)
            node = Node(own, NODE_NAME, folder, self._resources, **self._node_options)
            self.node = await self._stack.enter_async_context(node)

    async def _acting_as(self, name: str, group: str = "") -> Client:
        """A client by another name: admission policies tell Kubernetes' own programs from administrators."""
        return await self._stack.enter_async_context(self.client.acting_as(name, group))

    async def _grant(self, name: str, rules: Sequence[Mapping[str, Any]], user: str) -> None:
        for key, _, body in identities.grant(name, rules, {"kind": "User", "name": user}):
            plural, _, group = key.partition(".")
            resource = Resource(f"/apis/{group}/v1", plural, "", namespaced=False)
            await self.client.create(resource, None, body)

    async def _start_control_plane(self) -> ApiServer | None:
        """Sets `kubeconfig`; the server where it is the sandbox's own."""
        if self._assets:
            plane = await ControlPlane.start(self._assets, self._directory / "control-plane")
            self._stack.push_async_callback(plane.stop)
            self.kubeconfig = plane.kubeconfig
            return None
        from finetune_sandbox.server import ApiServer  # here: a real control plane needs none of it

        server = ApiServer()
        await server.start(self._directory / "api-server")
        self._stack.push_async_callback(server.stop)
        self.kubeconfig = server.kubeconfig
        return server


@dataclass(frozen=True)
class SandboxInfo:
    """A running sandbox as its `sandbox.json` describes it. Paths are absolute."""

    name: str
    pid: int
    kubeconfig: str
    node: str
    s3_endpoint: str
    s3_region: str
    s3_credentials: str
    """An AWS credentials file (profile "default") of the administrator."""
    log: str

    def credentials(self) -> Credentials:
        profiles = configparser.ConfigParser(interpolation=None)
        profiles.read(self.s3_credentials)
        profile = profiles["default"]
        return Credentials(profile["aws_access_key_id"], profile["aws_secret_access_key"])

    def s3(self) -> S3:
        """The S3 server as an administrator sees it: buckets and users can be created."""
        return S3(self.s3_endpoint, self.credentials(), None)


def running(directory: Path) -> SandboxInfo | None:
    """The sandbox that runs in `directory`; None where none does (or it is still starting)."""
    try:
        if not _is_locked(directory):
            return None  # what is in the folder was left behind
        return SandboxInfo(**json.loads((directory / _INFO).read_text()))
    except FileNotFoundError:
        return None


def _is_locked(directory: Path) -> bool:
    """Whether a sandbox runs here: it holds the lock as long as it lives, however it ends."""
    with (directory / _LOCK).open("rb") as lock:
        return not _try_lock(lock, fcntl.LOCK_SH)


def _try_lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def serve(directory: Path, resources: Mapping[str, str] | None = None) -> None:
    """Runs a sandbox in the foreground until SIGTERM or SIGINT. Raises SandboxError where one runs there already."""
    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(directory):
        asyncio.run(_serve(directory, resources or {}))


async def _serve(directory: Path, resources: Mapping[str, str]) -> None:
    async with Sandbox(directory, resources=resources) as sandbox, _described(directory, sandbox):
        log.info("the sandbox is up: KUBECONFIG=%s", sandbox.kubeconfig)
        await until_signal()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / _LOCK).open("ab") as lock:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(lock, fcntl.LOCK_EX):  # one that only asks whether we run holds it for a moment
            if time.monotonic() > deadline:
                raise SandboxError(f"a sandbox runs in {directory} already")
            time.sleep(_POLL_SECONDS)
        with contextlib.suppress(FileNotFoundError):
            (directory / _INFO).unlink()  # of one that was killed
        yield


@asynccontextmanager
async def _described(directory: Path, sandbox: Sandbox) -> AsyncIterator[None]:
    """sandbox.json, there exactly as long as the sandbox is ready."""
    assert sandbox.s3 is not None
    assert sandbox.node is not None
    admin = sandbox.s3.admin
    credentials = directory / _CREDENTIALS
    keys = f"aws_access_key_id = {admin.access_key_id}\naws_secret_access_key = {admin.secret_access_key}\n"
    _write_private(credentials, f"[default]\n{keys}")
    info = SandboxInfo(
        name=sandbox.name,
        pid=os.getpid(),
        kubeconfig=str(sandbox.kubeconfig),
        node=sandbox.node.name,
        s3_endpoint=sandbox.s3.endpoint,
        s3_region=sandbox.s3.region,
        s3_credentials=str(credentials),
        log=str(directory / _LOG),
    )
    _write_private(directory / _INFO, json.dumps(asdict(info), indent=2))
    try:
        yield
    finally:
        (directory / _INFO).unlink(missing_ok=True)


def _write_private(path: Path, text: str) -> None:
    """Mode 0600 from the first byte, and never half a file."""
    new = path.with_suffix(".new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    new.touch(mode=0o600)
    new.write_text(text)
    new.replace(path)


def start_background(directory: Path, resources: Mapping[str, str] | None = None) -> SandboxInfo:
    """Starts a sandbox that outlives this process and waits until it is ready; one that runs already is returned.

    Raises SandboxError with the end of its log where it does not come up.
    """
    directory = directory.resolve()
    if info := running(directory):
        return info
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    wanted = [f"--resource={name}={value}" for name, value in (resources or {}).items()]
    with (directory / _LOG).open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "finetune_sandbox.up", str(directory), *wanted],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_SECONDS
    while (info := running(directory)) is None:
        if started.poll() is not None or time.monotonic() > deadline:
            started.kill()
            started.wait()
            tail = "\n".join((directory / _LOG).read_text(errors="replace").splitlines()[-20:])
            raise SandboxError(f"the sandbox did not start; the end of {directory / _LOG}:\n{tail}")
        time.sleep(_POLL_SECONDS)
    started.returncode = 0  # it is to outlive us: not a child that was forgotten
    return info


def stop_background(directory: Path) -> bool:
    """Stops the sandbox of `directory`; False where none runs. SIGTERM first, SIGKILL after some seconds."""
    directory = directory.resolve()
    info = running(directory)
    if info is None:
        return False
    process = os.pidfd_open(info.pid)
    try:
        if running(directory) != info:
            return False  # it ended meanwhile, and the number may be another's
        for number, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
            signal.pidfd_send_signal(process, number)
            deadline = time.monotonic() + patience
            while _is_locked(directory):
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_SECONDS)
            else:
                return True
    finally:
        os.close(process)
    raise SandboxError(f"the sandbox in {directory} (process {info.pid}) does not end")


def main() -> None:
    """`python -m finetune_sandbox.up DIRECTORY [--resource=NAME=QUANTITY …]`: what start_background starts."""
    configure_logging()
    resources = dict(word.removeprefix("--resource=").split("=", 1) for word in sys.argv[2:])
    serve(Path(sys.argv[1]), resources)


if __name__ == "__main__":
    main()
