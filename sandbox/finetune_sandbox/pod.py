"""One pod on the process node: volumes, init containers, containers, restarts, termination, status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from finetune_sandbox import volumes
from finetune_sandbox.client import (
    CONFIGMAPS,
    PODS,
    SECRETS,
    SERVICE_ACCOUNTS,
    STRATEGIC_PATCH,
    ApiError,
    Object,
    until_done,
)
from finetune_sandbox.container import ContainerRun, Frame, StartError
from finetune_sandbox.devices import DevicesTaken
from finetune_sandbox.environment import ConfigError, Mount, Place, Sources, env_sources, environment, own_address
from finetune_sandbox.host import Host, now
from finetune_sandbox.podstatus import TERMINAL, Container, PodFacts, phase, pod_status
from finetune_sandbox.tasks import cancel, spawn

log = logging.getLogger(__name__)

TRANSIENT = (ApiError, aiohttp.ClientError, TimeoutError, OSError)
_CALM_SECONDS = 600.0
_CLOSE_SECONDS = 1.0


class PodWorker:
    """Runs a pod until it has ended or is deleted, and tells the API server. `close()` kills it without a word."""

    def __init__(self, host: Host, pod: Object) -> None:
        self.pod = pod
        self._host = host
        self.uid: str = pod["metadata"]["uid"]
        self._namespace, self._name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        self.directory = host.directory / "pods" / self.uid
        self._memory = host.memory_directory / self.uid
        self.place = Place(host.node, host.address, own_address(host.seed, pod), host.seed, host.allocatable)
        spec = pod["spec"]
        self.records: dict[str, Container] = {
            container["name"]: Container(container["name"], container.get("image") or "", init)
            for init, group in ((True, spec.get("initContainers") or []), (False, spec["containers"]))
            for container in group
        }
        self._specs = {c["name"]: c for c in [*(spec.get("initContainers") or []), *spec["containers"]]}
        self._start_time = now()
        self._finished = self._gone = False
        self._prepared = asyncio.Event()
        self._verdict: tuple[str, str] | None = None
        self._sent: Object = {}
        self._conditions: list[Object] = list((pod.get("status") or {}).get("conditions") or [])
        self._lock = asyncio.Lock()
        self._dirty = asyncio.Event()
        self._stopping = asyncio.Event()
        self._deleting = asyncio.Event()
        self._running: dict[str, ContainerRun] = {}
        self._kill_timer: asyncio.TimerHandle | None = None
        self._tokens: dict[volumes.Token, datetime] = {}
        self._task = spawn(self._run(), f"pod {self._namespace}/{self._name}")

    # What the node tells a worker.

    def delete(self, grace: float) -> None:
        """The pod has a deletionTimestamp: SIGTERM now, SIGKILL after `grace` seconds, then the object goes."""
        self._deleting.set()
        self._stop(grace)

    def fail(self, reason: str, message: str, grace: float) -> None:
        """Ends the pod as Failed for a reason of its own."""
        if self._verdict is None and not self._finished:
            self._verdict = (reason, message)
            self._stop(grace)

    async def close(self) -> None:
        """Kills what runs, waits for it and removes the pod's folders; writes no status."""
        self._gone = True
        self._deleting.set()
        self._stop(0)
        await asyncio.gather(*(run.process.wait() for run in self._running.values()))
        _, pending = await asyncio.wait({self._task}, timeout=_CLOSE_SECONDS)
        if pending:  # in the middle of a request
            self._task.cancel()
            await asyncio.wait({self._task})
        for folder in (self.directory, self._memory):
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def process_ids(self) -> dict[str, int]:
        return {name: pid for name, run in self._running.items() if (pid := run.process.command_pid()) is not None}

    def _stop(self, grace: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        if self._kill_timer is None or deadline < self._kill_timer.when():
            if self._kill_timer:
                self._kill_timer.cancel()
            self._kill_timer = loop.call_at(deadline, self._kill)
        if not self._stopping.is_set():
            self._stopping.set()
            for run in self._running.values():
                run.process.terminate()

    def _kill(self) -> None:
        for run in self._running.values():
            run.process.kill()

    # The life of a pod.

    async def _run(self) -> None:
        helpers = [
            spawn(work, f"{name} of pod {self._namespace}/{self._name}")
            for name, work in (
                ("status", self._publish_loop()),
                ("tokens", self._renew_tokens()),
                ("deadline", self._deadline()),
            )
        ]
        try:
            self._dirty.set()
            await self._live()
        except Exception as error:
            log.exception("pod %s/%s: the node failed", self._namespace, self._name)
            self._verdict = ("NodeError", f"{type(error).__name__}: {error}")
            self._kill()
        finally:
            self._finished = True
            self._host.devices.release(self.uid)
            await cancel(helpers)
        await self._publish()
        await self._deleting.wait()
        await self._patiently(
            lambda: self._host.client.delete(PODS, self._namespace, self._name, uid=self.uid, grace_seconds=0)
        )

    async def _live(self) -> None:
        try:
            volumes.check(self.pod)
            self._host.devices.acquire(self.uid, self.pod)
        except volumes.UnsupportedVolume as error:
            await self._event("Warning", "FailedMount", str(error))
            self._verdict = ("UnsupportedVolume", str(error))
            return
        except DevicesTaken as error:
            self._verdict = ("UnexpectedAdmissionError", str(error))
            return
        if not await self._prepare():
            return
        self._prepared.set()
        init = [record.name for record in self.records.values() if record.init]
        for name in init:
            if not await self._keep_running(name):
                return
        mains = [record.name for record in self.records.values() if not record.init]
        await asyncio.gather(*(self._keep_running(name) for name in mains))

    async def _prepare(self) -> bool:
        """Volumes, tried again until what they name exists; False where the pod was stopped first."""
        last = ""
        has_init = any(record.init for record in self.records.values())
        for name, record in self.records.items():
            waiting = "PodInitializing" if has_init and not record.init else "ContainerCreating"
            self._set(name, state={"waiting": {"reason": waiting}})
        while not self._stopping.is_set():
            try:
                sources = await self._fetch(volumes.volume_sources(self.pod))
                await self._mount(sources)
                return True
            except (ConfigError, *TRANSIENT) as error:
                if str(error) != last:
                    last = str(error)
                    await self._event("Warning", "FailedMount", f"MountVolume.SetUp failed: {error}")
                await self._pause(self._host.retry)
        return False

    async def _mount(self, sources: Sources) -> None:
        for volume in self.pod["spec"].get("volumes") or []:
            content = volumes.files(self.pod, volume, sources, self.place)
            folder = self.volume_folder(volume)
            folder.mkdir(parents=True, exist_ok=True)
            volumes.write_files(folder, content)
        for token in volumes.tokens(self.pod):
            await self._write_token(token)

    def volume_folder(self, volume: Object) -> Path:
        parent: Path = self._memory if volumes.in_memory(volume) else self.directory / "volumes"
        return parent / str(volume["name"])

    async def _write_token(self, token: volumes.Token) -> None:
        account = self.pod["spec"].get("serviceAccountName") or "default"
        spec: dict[str, Any] = {
            "expirationSeconds": token.expiration_seconds,
            "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": self._name, "uid": self.uid},
        }
        if token.audience:
            spec["audiences"] = [token.audience]
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = await self._host.client.create(SERVICE_ACCOUNTS, self._namespace, body, "token", account)
        volume = next(v for v in self.pod["spec"]["volumes"] if v["name"] == token.volume)
        file = volumes.File(answer["status"]["token"].encode(), volumes.TOKEN_MODE)
        volumes.write_file(self.volume_folder(volume) / token.path, file)
        expires = datetime.fromisoformat(answer["status"]["expirationTimestamp"])
        self._tokens[token] = datetime.now(UTC) + (expires - datetime.now(UTC)) * self._host.token_renewal

    async def _renew_tokens(self) -> None:
        """Renews each token when most of its life is over, as a kubelet does."""
        await self._prepared.wait()
        while self._tokens:
            due = min(self._tokens.values())
            await asyncio.sleep(max((due - datetime.now(UTC)).total_seconds(), 0.05))
            for token in [token for token, at in self._tokens.items() if at <= datetime.now(UTC)]:
                try:
                    await self._write_token(token)
                except TRANSIENT as error:
                    log.warning("pod %s/%s: token %s not renewed: %s", self._namespace, self._name, token.path, error)
                    self._tokens[token] = datetime.now(UTC) + timedelta(seconds=self._host.retry)

    async def _deadline(self) -> None:
        seconds = self.pod["spec"].get("activeDeadlineSeconds")
        if seconds:
            await asyncio.sleep(seconds)
            grace = float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))
            message = "Pod was active on the node longer than the specified deadline"
            self.fail("DeadlineExceeded", message, grace)

    # Containers.

    async def _keep_running(self, name: str) -> bool:
        """Runs a container as often as the restart policy says; True where it ended well for good."""
        policy = self.pod["spec"].get("restartPolicy") or "Always"
        delay = self._host.crash_backoff
        while not self._stopping.is_set():
            began = asyncio.get_running_loop().time()
            if not await self._run_once(name):
                return False
            record = self.records[name]
            done = record.exit_code == 0 and (record.init or policy != "Always")
            if done or policy == "Never":
                return record.exit_code == 0
            if asyncio.get_running_loop().time() - began > _CALM_SECONDS:
                delay = self._host.crash_backoff
            message = f"back-off {delay:g}s restarting failed container={name} pod={self._name}_{self._namespace}"
            waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": message}}
            self._set(name, state=waiting, last_state=record.state)
            await self._event("Warning", "BackOff", message)
            if await self._pause(delay):
                self._set(name, state=record.state, last_state=record.last_state)
                return False
            delay = min(delay * 2, self._host.crash_backoff_max)
            self._set(name, restarts=record.restarts + 1)
        return False

    async def _run_once(self, name: str) -> bool:
        """Starts a container, again until it can be configured, and waits for its end; False: stopped first."""
        last = ""
        while not self._stopping.is_set():
            try:
                run = await self._start(name)
            except (ConfigError, *TRANSIENT) as error:
                reason = "CreateContainerConfigError" if isinstance(error, ConfigError) else "CreateContainerError"
                self._set(name, state={"waiting": {"reason": reason, "message": str(error)}})
                if str(error) != last:
                    last = str(error)
                    await self._event("Warning", "Failed", f"Error: {error}")
                await self._pause(self._host.retry)
                continue
            except StartError as error:
                await self._event("Warning", "Failed", f"Error: {error}")
                if error.waiting:
                    self._set(name, state={"waiting": {"reason": "CreateContainerError", "message": str(error)}})
                    await self._stopping.wait()
                    return False
                self._set(name, state={"terminated": error.terminated(now())})
                return True
            if run is None:
                return False
            self._set(name, state={"terminated": await run.result()})
            del self._running[name]
            return True
        return False

    async def _start(self, name: str) -> ContainerRun | None:
        spec = self._specs[name]
        sources = await self._fetch(env_sources(spec))
        variables = environment(self.pod, spec, sources, self.place)
        variables = self._host.devices.variables(self.uid, spec) | variables
        if self._stopping.is_set():
            return None
        restarts = self.records[name].restarts
        frame = Frame(self.pod, self.place, self.directory)
        run = ContainerRun.start(self._host, frame, spec, variables, self._mounts(spec), restarts)
        self._running[name] = run
        self._set(name, state={"running": {"startedAt": run.started_at}}, container_id=run.id)
        return run

    def _mounts(self, container: Object) -> list[Mount]:
        by_name = {volume["name"]: volume for volume in self.pod["spec"].get("volumes") or []}
        found = []
        for mount in container.get("volumeMounts") or []:
            folder = self.volume_folder(by_name[mount["name"]])
            if mount.get("subPath"):
                folder = folder / mount["subPath"]
                if not folder.exists():
                    folder.mkdir(parents=True)
            found.append(Mount(mount["mountPath"], str(folder)))
        return found

    async def _fetch(self, names: Iterable[tuple[str, str]]) -> Sources:
        found: dict[tuple[str, str], Object | None] = {}
        for kind, name in sorted(names):
            try:
                item = await self._host.client.get(SECRETS if kind == "Secret" else CONFIGMAPS, self._namespace, name)
                found[kind, name] = item | {"kind": kind}
            except ApiError as error:
                if error.status != 404:
                    raise
                found[kind, name] = None
        return found

    async def _pause(self, seconds: float) -> bool:
        """Waits, at most until the pod is stopped; whether it was."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    # What the API server is told.

    def _set(self, name: str, **changes: Any) -> None:
        self.records[name] = replace(self.records[name], **changes)
        self._dirty.set()

    def _facts(self) -> PodFacts:
        return PodFacts(
            containers=list(self.records.values()),
            restart_policy=self.pod["spec"].get("restartPolicy") or "Always",
            start_time=self._start_time,
            host_ip=self._host.address,
            pod_ip=self.place.pod_ip,
            prepared=self._prepared.is_set(),
            verdict=self._verdict,
            stopped=self._finished and self._stopping.is_set(),
        )

    @property
    def terminal(self) -> bool:
        return self._finished and phase(self._facts()) in TERMINAL

    async def _publish_loop(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._publish()

    async def _publish(self) -> None:
        async with self._lock:
            old = {"conditions": self._conditions, "qosClass": (self.pod.get("status") or {}).get("qosClass")}
            status = pod_status(self._facts(), old, now())
            if self._gone or status == self._sent:
                return
            body = {"metadata": {"uid": self.uid}, "status": status}
            patch = self._host.client.patch
            await self._patiently(lambda: patch(PODS, self._namespace, self._name, body, "status", STRATEGIC_PATCH))
            self._sent, self._conditions = status, status["conditions"]

    async def _patiently(self, call: Callable[[], Awaitable[object]]) -> None:
        """A status that is lost would hang the Job: repeated until it is written or the pod is gone."""
        if not await until_done(call, f"pod {self._namespace}/{self._name}", lambda: self._gone):
            self._gone = True

    async def _event(self, type: str, reason: str, message: str) -> None:
        await self._host.recorder.event(self.pod, PODS, type, reason, message)
