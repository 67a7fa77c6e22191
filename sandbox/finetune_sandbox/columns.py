"""The columns of the built-in kinds that people look at, as `kubectl get` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_sandbox.meta import parse_time
from finetune_sandbox.resources import Column
from finetune_sandbox.table import age, human_duration, json_path, since

Obj = Mapping[str, Any]
AGE = Column("Age", age)


def _path(name: str, path: str, kind: str = "string", priority: int = 0, empty: str = "<none>") -> Column:
    cell = json_path(path, kind)
    return Column(name, lambda o: cell(o) if cell(o) not in (None, "") else empty, kind, priority)


def _ready(pod: Obj) -> str:
    states = pod["status"].get("containerStatuses") or ()
    return f"{sum(1 for s in states if s.get('ready'))}/{len(pod['spec']['containers'])}"


def _pod_status(pod: Obj) -> str:
    """The phase, or the reason that says more."""
    status, data = pod["status"], pod["metadata"]
    reason = status.get("reason") or status.get("phase") or "Unknown"
    for key, prefix in (("initContainerStatuses", "Init:"), ("containerStatuses", "")):
        for state in (s.get("state") or {} for s in status.get(key) or ()):
            if waiting := (state.get("waiting") or {}).get("reason"):
                reason = prefix + waiting if waiting != "PodInitializing" else reason
            elif ended := state.get("terminated"):
                if prefix and ended.get("exitCode") == 0:
                    continue
                reason = prefix + (ended.get("reason") or f"ExitCode:{ended.get('exitCode')}")
    return "Terminating" if "deletionTimestamp" in data else str(reason)


def _restarts(pod: Obj) -> str:
    return str(sum(int(s.get("restartCount", 0)) for s in pod["status"].get("containerStatuses") or ()))


def _job_status(job: Obj) -> str:
    on = {c["type"] for c in job["status"].get("conditions") or () if c.get("status") == "True"}
    for condition in ("Complete", "Failed"):
        if condition in on:
            return condition
    if "deletionTimestamp" in job["metadata"]:
        return "Terminating"
    return next((c for c in ("Suspended", "FailureTarget", "SuccessCriteriaMet") if c in on), "Running")


def _completions(job: Obj) -> str:
    done, spec = job["status"].get("succeeded", 0), job["spec"]
    if spec.get("completions") is not None:
        return f"{done}/{spec['completions']}"
    parallel = spec.get("parallelism", 1)
    return f"{done}/1 of {parallel}" if parallel > 1 else f"{done}/1"


def _each_container(job: Obj, field: str) -> str:
    return ",".join(c[field] for c in job["spec"]["template"]["spec"]["containers"])


def _duration(job: Obj) -> str:
    start, end = job["status"].get("startTime"), job["status"].get("completionTime")
    if not start:
        return ""
    return human_duration((parse_time(end) - parse_time(start)).total_seconds()) if end else since(start)


def _node_status(node: Obj) -> str:
    ready = [c for c in (node.get("status") or {}).get("conditions") or () if c["type"] == "Ready"]
    text = "Unknown" if not ready else "Ready" if ready[0]["status"] == "True" else "NotReady"
    return text + (",SchedulingDisabled" if node["spec"].get("unschedulable") else "")


def _roles(node: Obj) -> str:
    prefix = "node-role.kubernetes.io/"
    found = [k.removeprefix(prefix) for k in node["metadata"].get("labels", {}) if k.startswith(prefix)]
    return ",".join(sorted(found)) or "<none>"


def _ports(service: Obj) -> str:
    return ",".join(f"{p['port']}/{p['protocol']}" for p in service["spec"].get("ports") or ()) or "<none>"


def _pairs(labels: Mapping[str, str] | None) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted((labels or {}).items())) or "<none>"


def _external(service: Obj) -> str:
    return str(service["spec"].get("externalName") or "<none>")


def _event_object(event: Obj) -> str:
    involved = event["involvedObject"]
    return f"{str(involved.get('kind', '')).lower()}/{involved.get('name', '')}"


def _last_seen(event: Obj) -> str:
    series = (event.get("series") or {}).get("lastObservedTime")
    seen = series or event.get("lastTimestamp") or event.get("eventTime")
    return since(seen or event["metadata"]["creationTimestamp"])


NAMESPACE = (_path("Status", ".status.phase"), AGE)
POD = (
    Column("Ready", _ready),
    Column("Status", _pod_status),
    Column("Restarts", _restarts),
    AGE,
    _path("IP", ".status.podIP", priority=1),
    _path("Node", ".spec.nodeName", priority=1),
    _path("Nominated Node", ".status.nominatedNodeName", priority=1),
    Column("Readiness Gates", lambda o: "<none>", priority=1),
)
SERVICE = (
    _path("Type", ".spec.type"),
    _path("Cluster-IP", ".spec.clusterIP"),
    Column("External-IP", _external),
    Column("Port(s)", _ports),
    AGE,
    Column("Selector", lambda o: _pairs(o["spec"].get("selector")), priority=1),
)
DATA = (Column("Data", lambda o: len(o.get("data") or {}) + len(o.get("binaryData") or {})), AGE)
SECRET = (_path("Type", ".type"), Column("Data", lambda o: len(o.get("data") or {})), AGE)
ACCOUNT = (Column("Secrets", lambda o: len(o.get("secrets") or ())), AGE)
EVENT = (
    Column("Last Seen", _last_seen),
    _path("Type", ".type"),
    _path("Reason", ".reason"),
    Column("Object", _event_object),
    _path("Source", ".source.component", priority=1, empty=""),
    Column("Message", lambda o: str(o.get("message", "")).strip()),
    Column("Count", lambda o: o.get("count", 1), "integer", 1),
)
NODE = (
    Column("Status", _node_status),
    Column("Roles", _roles),
    AGE,
    _path("Version", ".status.nodeInfo.kubeletVersion", empty=""),
    _path("Internal-IP", '.status.addresses[?(@.type=="InternalIP")].address', priority=1),
)
CLAIM = (
    _path("Status", ".status.phase"),
    _path("Volume", ".spec.volumeName", empty=""),
    _path("Capacity", ".status.capacity.storage", empty=""),
    _path("StorageClass", ".spec.storageClassName", empty=""),
    AGE,
)
JOB = (
    Column("Status", _job_status),
    Column("Completions", _completions),
    Column("Duration", _duration),
    AGE,
    Column(
        "Containers", lambda o: ",".join(c["name"] for c in o["spec"]["template"]["spec"]["containers"]), priority=1
    ),
    Column("Images", lambda o: ",".join(c["image"] for c in o["spec"]["template"]["spec"]["containers"]), priority=1),
    Column("Selector", lambda o: _pairs(o["spec"].get("selector", {}).get("matchLabels")), priority=1),
)
LEASE = (_path("Holder", ".spec.holderIdentity", empty=""), AGE)
NETWORK_POLICY = (Column("Pod-Selector", lambda o: _pairs(o["spec"].get("podSelector", {}).get("matchLabels"))), AGE)
PRIORITY = (
    Column("Value", lambda o: o["value"]),
    Column("Global-Default", lambda o: str(bool(o.get("globalDefault"))).lower()),
    AGE,
    _path("PreemptionPolicy", ".preemptionPolicy"),
)
CRD = (Column("Created At", lambda o: o["metadata"]["creationTimestamp"], "date"),)
