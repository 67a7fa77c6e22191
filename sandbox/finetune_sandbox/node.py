"""The process node: registers a Node and runs the pods that are bound to it as processes of this machine.

Linux only. It is no container runtime: images are ignored (a pod must name its command), nothing is isolated; users,
probes, lifecycle hooks and security contexts are not applied. ConfigMaps and Secrets are written once, the size limit
of an emptyDir is not enforced. What it does keep is the contract of a pod: see environment.py, volumes.py, pod.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from finetune_sandbox.binder import Binder
from finetune_sandbox.cgroup import PREFIX, MemoryGroups
from finetune_sandbox.client import (
    LEASES,
    NAMESPACES,
    NODES,
    PODS,
    STRATEGIC_PATCH,
    ApiError,
    Change,
    Client,
    Object,
    Recorder,
    until_done,
)
from finetune_sandbox.container import log_file
from finetune_sandbox.devices import GPU, Devices
from finetune_sandbox.host import Host, now
from finetune_sandbox.logs import LogServer, follow_file, tail_offset
from finetune_sandbox.pod import PodWorker
from finetune_sandbox.podstatus import TERMINAL
from finetune_sandbox.process import left_behind
from finetune_sandbox.tasks import cancel, spawn, until_signal

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")
"""Where an emptyDir of medium Memory lies, if we may write there."""
LEASE_NAMESPACE = "kube-node-lease"
_LEASE_SECONDS = 40
_HEARTBEAT_SECONDS = 10.0
_MAX_PODS = 250
NOT_READY = "node.kubernetes.io/not-ready"
LOST = ("NodeLost", "The node was restarted and does not run this pod any more")


def host_resources(extra: Mapping[str, str]) -> dict[str, str]:
    """This machine's capacity, overridden and extended by `extra`, as in a Node's status."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    own = {
        "cpu": str(len(os.sched_getaffinity(0))),
        "memory": f"{pages // 1024}Ki",
        "ephemeral-storage": f"{shutil.disk_usage('/').free // 1024}Ki",
        "pods": str(_MAX_PODS),
    }
    return own | dict(extra)


class Node:
    """One process node. `start()`, then `close()`; or an async context manager. `options` are fields of Host."""

    def __init__(
        self,
        client: Client,
        name: str,
        directory: Path,
        resources: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.name = name
        self._client = client
        self.directory = directory / name  # of its own: what lies there is removed at the start
        self._resources = host_resources(resources or {})
        self._options = options
        self._recorder = Recorder(client, "process-node", name, now)
        self._workers: dict[str, PodWorker] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._server = LogServer(self, ADDRESS)
        self._synced = asyncio.Event()

    async def __aenter__(self) -> Node:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Registers the node and returns once it has seen its pods. Raises ApiError or aiohttp.ClientError."""
        self._host = await self._make_host()
        await self._server.start()
        try:
            await self._register()
        except BaseException:
            await self._server.stop()
            raise
        self._tasks = [
            spawn(self._heartbeats(), f"heartbeats of node {self.name}"),
            spawn(self._watch(), f"pod watch of node {self.name}"),
        ]
        await self._synced.wait()

    async def _make_host(self) -> Host:
        system = await self._client.get(NAMESPACES, None, "kube-system")
        self.directory.mkdir(parents=True, exist_ok=True)
        shared = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else self.directory
        memory = shared / f"{PREFIX}{os.getpid()}-{self.name}"
        for left_over in (self.directory / "pods", *left_behind(shared, PREFIX)):
            await asyncio.to_thread(shutil.rmtree, left_over, ignore_errors=True)
        groups = MemoryGroups(self.name)
        if groups.reason:
            log.info("memory limits are not enforced on this node: %s", groups.reason)
        return Host(
            client=self._client,
            recorder=self._recorder,
            node=self.name,
            address=ADDRESS,
            seed=system["metadata"]["uid"],
            allocatable=self._resources,
            directory=self.directory,
            memory_directory=memory,
            devices=Devices(int(self._resources.get(GPU, "0"))),
            groups=groups,
            **self._options,
        )

    async def close(self) -> None:
        """Kills every pod's processes. Their pods are reported as lost by the next start, as after a power cut."""
        await cancel(self._tasks)
        try:
            status = self._status(ready=False)
            await self._client.patch(NODES, None, self.name, {"status": status}, "status", STRATEGIC_PATCH)
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            log.info("node %s: its end was not told: %s", self.name, error)  # the API server is gone, too
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))
        await cancel(self._background)
        self._workers.clear()
        await self._server.stop()
        await asyncio.to_thread(shutil.rmtree, self._host.memory_directory, ignore_errors=True)

    # The Node object.

    def _status(self, ready: bool = True) -> Object:
        at = now()
        healthy = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "process node is ready"}
        stopped = {
            "type": "Ready",
            "status": "False",
            "reason": "KubeletNotReady",
            "message": "process node has stopped",
        }
        ready_condition = healthy if ready else stopped
        pressures = [
            {
                "type": kind,
                "status": "False",
                "reason": "NotMeasured",
                "message": "a process node does not measure this",
            }
            for kind in ("MemoryPressure", "DiskPressure", "PIDPressure")
        ]
        return {
            "capacity": self._resources,
            "allocatable": self._resources,
            "addresses": [{"type": "InternalIP", "address": ADDRESS}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.port}},
            "conditions": [
                condition | {"lastHeartbeatTime": at, "lastTransitionTime": at}
                for condition in (*pressures, ready_condition)
            ],
            "nodeInfo": {
                "machineID": "",
                "systemUUID": "",
                "bootID": "",
                "kernelVersion": platform.release(),
                "osImage": platform.platform(),
                "containerRuntimeVersion": "process://1",
                "kubeletVersion": "v1.36.0-process-node",
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
            },
        }

    async def _register(self) -> None:
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": self._status()["nodeInfo"]["architecture"],
        }
        node: Object = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": labels},
            "spec": {},
        }
        try:
            node = await self._client.create(NODES, None, node)
        except ApiError as error:
            if error.status != 409:
                raise
            node = await self._client.patch(NODES, None, self.name, {"metadata": {"labels": labels}})
        # The API server's admission sets this taint on a new node; where no node controller runs, nobody takes it off.
        taints = [taint for taint in node["spec"].get("taints") or [] if taint["key"] != NOT_READY]
        if taints != (node["spec"].get("taints") or []):
            await self._client.patch(NODES, None, self.name, {"spec": {"taints": taints or None}})
        await self._client.patch(NODES, None, self.name, {"status": self._status()}, "status", STRATEGIC_PATCH)

    async def _heartbeats(self) -> None:
        while True:
            try:
                await self._renew_lease()
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("node %s: the lease was not renewed: %s", self.name, error)
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    async def _renew_lease(self) -> None:
        at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": self.name, "leaseDurationSeconds": _LEASE_SECONDS, "renewTime": at}
        try:
            await self._client.patch(LEASES, LEASE_NAMESPACE, self.name, {"spec": spec})
        except ApiError as error:
            if error.status != 404:
                raise
            metadata = {"name": self.name, "namespace": LEASE_NAMESPACE}
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
            await self._client.create(LEASES, LEASE_NAMESPACE, lease)

    # Pods.

    async def _watch(self) -> None:
        async for change in self._client.changes(PODS, fields=f"spec.nodeName={self.name}"):
            if change.type == "SYNCED":
                self._synced.set()
            else:
                self._handle(change)

    def _handle(self, change: Change) -> None:
        pod = change.object
        uid = pod["metadata"]["uid"]
        worker = self._workers.get(uid)
        if change.type == "DELETED":
            if worker:
                del self._workers[uid]
                self._spawn(worker.close(), "end of a pod")
            return
        grace = pod["metadata"].get("deletionGracePeriodSeconds")
        if worker is None:
            if not _untouched(pod):
                self._spawn(self._settle(pod), "settling of a pod")
                return
            worker = self._workers[uid] = PodWorker(self._host, pod)
        if pod["metadata"].get("deletionTimestamp"):
            worker.delete(float(grace or 0))

    async def _settle(self, pod: Object) -> None:
        """A pod that has run, but not here and now: lost if it was running, and removed if it is being deleted."""
        metadata = pod["metadata"]
        namespace, name, uid = metadata["namespace"], metadata["name"], metadata["uid"]
        if pod["status"].get("phase") not in TERMINAL:
            body = {"metadata": {"uid": uid}, "status": lost_status(pod, now())}
            patch = self._client.patch
            await self._until_done(lambda: patch(PODS, namespace, name, body, "status", STRATEGIC_PATCH), name)
        if metadata.get("deletionTimestamp") and metadata.get("deletionGracePeriodSeconds") != 0:
            delete = self._client.delete
            await self._until_done(lambda: delete(PODS, namespace, name, uid=uid, grace_seconds=0), name)

    async def _until_done(self, call: Callable[[], Awaitable[object]], name: str) -> None:
        await until_done(call, f"pod {name} from before this node's start", lambda: False)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = spawn(work, f"{name} on node {self.name}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _worker(self, namespace: str, name: str) -> PodWorker:
        for worker in self._workers.values():
            metadata = worker.pod["metadata"]
            if (metadata["namespace"], metadata["name"]) == (namespace, name):
                return worker
        raise LookupError(f'pod "{namespace}/{name}" does not run on node {self.name}')

    async def stream(
        self, namespace: str, pod: str, container: str, follow: bool = False, tail_lines: int | None = None
    ) -> AsyncIterator[bytes]:
        """A container's output (LogSource). Raises LookupError where it has not been started here."""
        worker = self._worker(namespace, pod)
        if container not in worker.records:
            raise LookupError(f'container "{container}" is not in pod "{namespace}/{pod}"')
        record = worker.records[container]
        path = log_file(worker.directory, container, record.restarts)
        if not path.exists():
            raise LookupError(f'container "{container}" in pod "{namespace}/{pod}" is waiting to start')
        offset = tail_offset(path, tail_lines)
        async for chunk in follow_file(path, offset, lambda: follow and worker.records[container].running):
            yield chunk

    async def preempt(self, namespace: str, name: str, message: str = "preempted for a test") -> None:
        """Ends a pod as the scheduler's preemption does: condition DisruptionTarget, then an ordinary deletion."""
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "PreemptionByScheduler",
            "message": message,
            "lastTransitionTime": now(),
        }
        body = {"status": {"conditions": [condition]}}
        await self._client.patch(PODS, namespace, name, body, "status", STRATEGIC_PATCH)
        await self._client.delete(PODS, namespace, name)

    @property
    def enforces_memory(self) -> bool:
        """Whether containers are held to their memory limits on this machine."""
        return not self._host.groups.reason

    async def cordon(self, on: bool = True) -> None:
        await self._client.patch(NODES, None, self.name, {"spec": {"unschedulable": on}})

    def process_ids(self, namespace: str, name: str) -> dict[str, int]:
        """The process id of each running container's command (for faults in tests)."""
        return self._worker(namespace, name).process_ids()


def _untouched(pod: Object) -> bool:
    """Whether no node has begun to run this pod."""
    status = pod.get("status") or {}
    if status.get("phase") not in (None, "", "Pending"):
        return False
    records = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return all("waiting" in (record.get("state") or {"waiting": {}}) for record in records)


def lost_status(pod: Object, at: str) -> dict[str, Any]:
    """A pod whose node was restarted: Failed, and what ran ended in a way that nobody saw (a kubelet's words)."""
    status = pod["status"]

    def ended(record: Object) -> Object:
        if "terminated" in (record.get("state") or {}):
            return record
        began = (record.get("state") or {}).get("running", {}).get("startedAt")
        state = {
            "exitCode": 137,
            "reason": "ContainerStatusUnknown",
            "message": "The container could not be located when the pod was terminated",
            "startedAt": began,
            "finishedAt": at,
        }
        return record | {"ready": False, "started": False, "state": {"terminated": state}}

    conditions = [
        {"type": kind, "status": "False", "reason": "PodFailed", "lastTransitionTime": at}
        for kind in ("Ready", "ContainersReady")
    ]
    return {
        "phase": "Failed",
        "reason": LOST[0],
        "message": LOST[1],
        "conditions": conditions,
        "containerStatuses": [ended(record) for record in status.get("containerStatuses") or []],
        "initContainerStatuses": [ended(record) for record in status.get("initContainerStatuses") or []],
    }


def serve(
    kubeconfig: Path | None, name: str, resources: Mapping[str, str], directory: Path, bind: bool = False
) -> None:
    """Serves any cluster with a process node until SIGTERM or SIGINT. `bind`: also schedules pods.

    Blocks. `kubeconfig` None is $KUBECONFIG or ~/.kube/config. Raises ApiError, aiohttp.ClientError or kubernetes'
    ConfigException where the cluster cannot be reached or does not let us register.
    """
    asyncio.run(_serve(kubeconfig, name, resources, directory, bind))


async def _serve(kubeconfig: Path | None, name: str, resources: Mapping[str, str], directory: Path, bind: bool) -> None:
    async with await Client.from_kubeconfig(kubeconfig) as client:
        binder = Binder(client) if bind else None
        async with Node(client, name, directory, resources):
            if binder:
                binder.start()
            log.info("node %s serves %s", name, client.host)
            await until_signal()
            if binder:
                await binder.close()
