"""A real control plane on loopback: the etcd, kube-apiserver and kube-controller-manager of one folder.

The folder is what `$KUBEBUILDER_ASSETS` names (the convention of envtest). Every port is the kernel's choice, every
credential is made anew, and everything is written below the folder that the caller gives.
"""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from cryptography.hazmat.primitives.asymmetric import ec

from finetune_sandbox.certificates import Authority, private_pem, public_pem, write_kubeconfig, write_private

ASSETS_VARIABLE = "KUBEBUILDER_ASSETS"
REQUIRED = ("etcd", "kube-apiserver", "kube-controller-manager")
SCHEDULER = "kube-scheduler"
ISSUER = "https://kubernetes.default.svc"
SYSTEM_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")

# What a job's life touches. Those that judge nodes stay out: they evict the pods of a node that sends no leases.
CONTROLLERS = (
    "clusterrole-aggregation-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "pod-garbage-collector-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "ttl-after-finished-controller",
    "validatingadmissionpolicy-status-controller",
)

_START_SECONDS = 90.0
# An API server with open watches takes a minute over a graceful end; nothing here is worth that wait.
_STOP_SECONDS = 3.0
_POLL_SECONDS = 0.1
_LOG_LINES = 20


class ControlPlaneError(RuntimeError):
    """A program is missing, died or did not become ready in time; the message ends with its last log lines."""


def assets_from_environment() -> Path | None:
    """The folder that `$KUBEBUILDER_ASSETS` names, or None where it is unset or empty."""
    value = os.environ.get(ASSETS_VARIABLE)
    return Path(value) if value else None


def find_programs(assets: Path, scheduler: bool) -> dict[str, Path]:
    """The programs to run, by name; ControlPlaneError names every one that is missing."""
    wanted = (*REQUIRED, SCHEDULER) if scheduler else REQUIRED
    programs = {name: assets / name for name in wanted}
    missing = [name for name, path in programs.items() if not os.access(path, os.X_OK)]
    if missing:
        raise ControlPlaneError(f"{assets} (${ASSETS_VARIABLE}) has no executable {', '.join(missing)}")
    return programs


@dataclass
class _Program:
    """One child process and its log file."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*_die_with_parent(), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C at the terminal is for us: we stop the programs, in order.
                start_new_session=True,
            )

    def check(self) -> None:
        if self.process is None or self.process.poll() is None:
            return
        raise ControlPlaneError(f"{self.name} ended with exit code {self.process.returncode}; {self.tail()}")

    def tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return f"the end of {self.log}:\n" + "\n".join(lines)

    async def stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(sig)
        deadline = time.monotonic() + _STOP_SECONDS
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            await asyncio.sleep(_POLL_SECONDS / 4)


class ControlPlane:
    """etcd, kube-apiserver and kube-controller-manager (kube-scheduler if asked), ready for use between start and stop.

    `kubeconfig` is a cluster administrator's (bearer token), `url` the API server's, `ca` the file with its CA.
    """

    def __init__(self, assets: Path, directory: Path, *, scheduler: bool = False) -> None:
        programs = find_programs(assets, scheduler)
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        api_port, etcd_port, etcd_peer_port = _free_ports(3)
        self.url = f"https://127.0.0.1:{api_port}"
        self._etcd_url = f"https://127.0.0.1:{etcd_port}"
        self.ca = self.directory / "ca.crt"
        self.kubeconfig = self.directory / "kubeconfig"
        self._token = secrets.token_urlsafe(32)
        self._write_credentials()
        commands = {
            "etcd": _etcd_flags(self.directory, etcd_port, etcd_peer_port),
            "kube-apiserver": _apiserver_flags(self.directory, api_port, etcd_port),
            "kube-controller-manager": _controller_manager_flags(self.directory),
            SCHEDULER: _scheduler_flags(self.directory),
        }
        self._programs = {
            name: _Program(name, [str(path), *commands[name]], self.directory / f"{name}.log")
            for name, path in programs.items()
        }

    @classmethod
    async def start(cls, assets: Path, directory: Path, *, scheduler: bool = False) -> Self:
        """Starts everything and returns once pods can be created; on failure nothing is left running."""
        plane = cls(assets, directory, scheduler=scheduler)
        await plane.__aenter__()
        return plane

    async def __aenter__(self) -> Self:
        try:
            for name, program in self._programs.items():
                program.start()
                if name == "kube-apiserver":
                    # Its clients come after it: a controller manager that nobody answers gives up within seconds.
                    await self._wait_ready()
            await self._wait_for("the default ServiceAccounts", self._namespaces_are_usable)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stops what runs, the last started first: SIGTERM, then SIGKILL. Safe to call twice."""
        for program in reversed(self._programs.values()):
            await program.stop()

    async def kill_apiserver(self) -> None:
        """SIGKILL, as a crash would; every open watch breaks. `restart_apiserver` brings it back."""
        await self._programs["kube-apiserver"].stop(signal.SIGKILL)

    async def restart_apiserver(self) -> None:
        """Stops the API server if it runs and starts it again, same port, same state; returns when it is ready."""
        apiserver = self._programs["kube-apiserver"]
        await apiserver.stop()
        apiserver.start()
        await self._wait_ready()

    async def compact(self) -> None:
        """Makes etcd forget all that was before now. The API server keeps its own recent history until it restarts."""
        trust = ssl.create_default_context(cafile=str(self.directory / "etcd-ca.crt"))
        trust.load_cert_chain(self.directory / "etcd.crt", self.directory / "etcd.key")
        async with aiohttp.ClientSession(self._etcd_url, connector=aiohttp.TCPConnector(ssl=trust)) as session:
            # etcd's JSON has bytes in base64 and 64-bit numbers as texts.
            async with session.post("/v3/kv/range", json={"key": "AA=="}, raise_for_status=True) as answer:
                revision = (await answer.json(content_type=None))["header"]["revision"]
            body = {"revision": revision, "physical": True}
            async with session.post("/v3/kv/compaction", json=body, raise_for_status=True) as answer:
                await answer.read()

    def check(self) -> None:
        """Raises ControlPlaneError, with the end of its log, if a program has ended by itself."""
        for program in self._programs.values():
            program.check()

    async def _wait_ready(self) -> None:
        # /readyz includes the RBAC bootstrap and the CRD informers.
        await self._wait_for("kube-apiserver's /readyz", self._is_ready)

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        async with session.get("/readyz") as response:
            return response.status == 200

    async def _namespaces_are_usable(self, session: aiohttp.ClientSession) -> bool:
        for namespace in SYSTEM_NAMESPACES:
            async with session.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/default") as response:
                if response.status != 200:
                    return False
        return True

    async def _wait_for(self, what: str, condition: Callable[[aiohttp.ClientSession], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        trust = ssl.create_default_context(cafile=str(self.ca))
        async with aiohttp.ClientSession(
            self.url,
            headers={"Authorization": f"Bearer {self._token}"},
            connector=aiohttp.TCPConnector(ssl=trust),
            timeout=aiohttp.ClientTimeout(total=5),
        ) as session:
            while True:
                self.check()
                problem = "it answered that it is not"
                try:
                    if await condition(session):
                        return
                except (aiohttp.ClientError, TimeoutError) as error:
                    problem = repr(error)  # most often: it does not listen yet
                if time.monotonic() > deadline:
                    tails = "\n".join(program.tail() for program in self._programs.values())
                    raise ControlPlaneError(f"no {what} within {_START_SECONDS:.0f} s ({problem}); {tails}")
                await asyncio.sleep(_POLL_SECONDS)

    def _write_credentials(self) -> None:
        """Everything that the flags below name, readable by this user alone."""
        folder = self.directory
        authority = Authority("finetune-sandbox")
        self.ca.write_bytes(authority.certificate)
        serving = authority.issue("kube-apiserver", hosts=("127.0.0.1", "localhost", "kubernetes.default.svc"))
        write_private(folder / "apiserver.crt", serving.certificate)
        write_private(folder / "apiserver.key", serving.key)
        # etcd has an authority of its own: nothing that the cluster trusts may speak to its store.
        etcd_authority = Authority("finetune-sandbox-etcd")
        etcd = etcd_authority.issue("etcd", hosts=("127.0.0.1",))
        write_private(folder / "etcd-ca.crt", etcd_authority.certificate)
        write_private(folder / "etcd.crt", etcd.certificate)
        write_private(folder / "etcd.key", etcd.key)
        account_key = ec.generate_private_key(ec.SECP256R1())
        write_private(folder / "service-account.key", private_pem(account_key))
        write_private(folder / "service-account.pub", public_pem(account_key))
        users = [("finetune-sandbox-admin", "system:masters", self._token, self.kubeconfig)]
        for name in ("kube-controller-manager", SCHEDULER):
            kubeconfig = folder / f"{name}.kubeconfig"
            users.append((f"system:{name}", f"system:{name}", secrets.token_urlsafe(32), kubeconfig))
        for _, _, token, kubeconfig in users:
            write_kubeconfig(kubeconfig, url=self.url, ca=authority.certificate, token=token)
        rows = [f"{token},{user},{user},{group}" for user, group, token, _ in users]
        write_private(folder / "tokens.csv", "\n".join(rows).encode())


def _etcd_flags(directory: Path, port: int, peer_port: int) -> list[str]:
    flags = [
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls=https://127.0.0.1:{port}",
        f"--advertise-client-urls=https://127.0.0.1:{port}",
        f"--listen-peer-urls=https://127.0.0.1:{peer_port}",
        f"--initial-advertise-peer-urls=https://127.0.0.1:{peer_port}",
        f"--initial-cluster=default=https://127.0.0.1:{peer_port}",
        # What is stored here need not survive the loss of power, only that of a process.
        "--unsafe-no-fsync",
    ]
    for prefix in ("", "peer-"):
        flags += [
            f"--{prefix}trusted-ca-file={directory / 'etcd-ca.crt'}",
            f"--{prefix}cert-file={directory / 'etcd.crt'}",
            f"--{prefix}key-file={directory / 'etcd.key'}",
            f"--{prefix}client-cert-auth=true",
        ]
    return flags


def _apiserver_flags(directory: Path, port: int, etcd_port: int) -> list[str]:
    return [
        f"--etcd-servers=https://127.0.0.1:{etcd_port}",
        f"--etcd-cafile={directory / 'etcd-ca.crt'}",
        f"--etcd-certfile={directory / 'etcd.crt'}",
        f"--etcd-keyfile={directory / 'etcd.key'}",
        "--bind-address=127.0.0.1",
        # Without these two it looks for a default route, and then fails to publish a loopback address as an endpoint.
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        f"--secure-port={port}",
        f"--tls-cert-file={directory / 'apiserver.crt'}",
        f"--tls-private-key-file={directory / 'apiserver.key'}",
        f"--token-auth-file={directory / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.0.0.0/16",
        f"--service-account-issuer={ISSUER}",
        f"--service-account-key-file={directory / 'service-account.pub'}",
        f"--service-account-signing-key-file={directory / 'service-account.key'}",
    ]


def _controller_manager_flags(directory: Path) -> list[str]:
    return [
        f"--kubeconfig={directory / 'kube-controller-manager.kubeconfig'}",
        f"--controllers={','.join(CONTROLLERS)}",
        "--use-service-account-credentials",
        f"--service-account-private-key-file={directory / 'service-account.key'}",
        f"--root-ca-file={directory / 'ca.crt'}",
        "--leader-elect=false",
        "--secure-port=0",
        # One machine, one user: the defaults (20 and 30 requests a second) are what a benchmark would measure.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
    ]


def _scheduler_flags(directory: Path) -> list[str]:
    return [
        f"--kubeconfig={directory / 'kube-scheduler.kubeconfig'}",
        "--leader-elect=false",
        "--secure-port=0",
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
    ]


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _die_with_parent() -> list[str]:
    """A prefix that has the kernel kill a program when the thread that started it ends; empty where there is none."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
