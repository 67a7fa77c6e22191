"""The smallest scheduler: binds pods of `default-scheduler` to nodes one by one, where the cluster has no scheduler.

It knows nodeSelector, nodeAffinity by name or label, taints with effect NoSchedule or NoExecute, cordons and resource
requests. A pod that asks for more (affinity to pods, topology spread) stays unschedulable and says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import aiohttp

from finetune_sandbox.client import NODES, PODS, STRATEGIC_PATCH, ApiError, Client, Object, Recorder, until_done
from finetune_sandbox.host import now
from finetune_sandbox.quantity import add, parse, pod_requests
from finetune_sandbox.tasks import cancel, spawn

log = logging.getLogger(__name__)

Resources = Mapping[str, Fraction]
SCHEDULER = "default-scheduler"
_RETRY_SECONDS = 1.0
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_OPERATORS: dict[str, Callable[[str | None, Mapping[str, Any]], bool]] = {
    "In": lambda found, rule: found in rule["values"],
    "NotIn": lambda found, rule: found not in rule["values"],
    "Exists": lambda found, rule: found is not None,
    "DoesNotExist": lambda found, rule: found is None,
}
"""Of node affinity, by what a node has under the key."""


@dataclass(frozen=True)
class Decision:
    """`node` for a pod that fits; else the message of its condition PodScheduled."""

    node: str | None
    message: str = ""


def usage(bound: Iterable[Mapping[str, Any]]) -> dict[str, Resources]:
    """What the pods of each node ask for, by node; one of `pods` for each."""
    used: dict[str, Resources] = {}
    for pod in bound:
        node = pod["spec"]["nodeName"]
        used[node] = add([used.get(node, {}), pod_requests(pod)])
    return used


def decide(pod: Mapping[str, Any], nodes: Sequence[Object], used: Mapping[str, Resources]) -> Decision:
    """Where a pod goes: of the nodes with room, the one with the fewest pods. `used` is the nodes' usage."""
    unsupported = _unsupported(pod["spec"])
    if unsupported:
        return Decision(None, f"0/{len(nodes)} nodes are available: {unsupported} is not supported by this scheduler.")
    fitting: list[tuple[Fraction, str]] = []
    problems: Counter[str] = Counter()
    for node in nodes:
        name = node["metadata"]["name"]
        taken = used.get(name, {})
        found = misfits(pod, node, taken)
        problems.update(found)
        if not found:
            fitting.append((taken.get("pods", Fraction(0)), name))
    if fitting:
        return Decision(min(fitting)[1])
    told = ", ".join(sorted(f"{count} {problem}" for problem, count in problems.items())) or "no nodes registered"
    message = f"0/{len(nodes)} nodes are available: {told}."
    if nodes:
        useless = f"{len(nodes)} Preemption is not helpful for scheduling"
        message += f" no new claims to deallocate, preemption: 0/{len(nodes)} nodes are available: {useless}."
    return Decision(None, message)


def _unsupported(spec: Mapping[str, Any]) -> str:
    affinity = spec.get("affinity") or {}
    if any(REQUIRED in rule for kind, rule in affinity.items() if kind != "nodeAffinity"):
        return "required affinity to pods"
    if any(rule["operator"] not in _OPERATORS for term in _terms(spec) for _, rule in _requirements(term)):
        return "required nodeAffinity by Gt or Lt"
    spread = spec.get("topologySpreadConstraints") or []
    return "topologySpreadConstraints" if any(rule["whenUnsatisfiable"] == "DoNotSchedule" for rule in spread) else ""


def _terms(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of which a node must match one, where there are any."""
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    return list((affinity.get(REQUIRED) or {}).get("nodeSelectorTerms") or [])


def _requirements(term: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(kind, rule) for kind in ("matchFields", "matchExpressions") for rule in term.get(kind) or ()]


def _matches(term: Mapping[str, Any], node: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    fields = {"metadata.name": node["metadata"]["name"]}
    rules = _requirements(term)
    # A term without requirements matches nothing.
    return bool(rules) and all(
        _OPERATORS[rule["operator"]]((fields if kind == "matchFields" else labels).get(rule["key"]), rule)
        for kind, rule in rules
    )


def misfits(pod: Mapping[str, Any], node: Object, used: Resources) -> list[str]:
    """Why a pod cannot go to a node, in the scheduler's words; empty where it can."""
    spec = node.get("spec") or {}
    status = node.get("status") or {}
    if spec.get("unschedulable"):
        return ["node(s) were unschedulable"]
    if not any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or []):
        return ["node(s) were not ready"]
    for taint in spec.get("taints") or []:
        if taint["effect"] != "PreferNoSchedule" and not _tolerated(taint, pod["spec"].get("tolerations") or []):
            return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"]
    labels = node["metadata"].get("labels") or {}
    if any(labels.get(key) != value for key, value in (pod["spec"].get("nodeSelector") or {}).items()):
        return ["node(s) didn't match Pod's node affinity/selector"]
    terms = _terms(pod["spec"])
    if terms and not any(_matches(term, node) for term in terms):
        return ["node(s) didn't match Pod's node affinity/selector"]
    room = {name: parse(value) for name, value in (status.get("allocatable") or {}).items()}
    short = [
        name
        for name, value in pod_requests(pod).items()
        if value and used.get(name, Fraction(0)) + value > room.get(name, Fraction(0))
    ]
    return ["Too many pods" if name == "pods" else f"Insufficient {name}" for name in short]


def _tolerated(taint: Mapping[str, Any], tolerations: Sequence[Mapping[str, Any]]) -> bool:
    return any(
        rule.get("key") in (None, "", taint["key"])
        and rule.get("effect") in (None, "", taint["effect"])
        and (rule.get("operator") == "Exists" or rule.get("value", "") == taint.get("value", ""))
        for rule in tolerations
    )


def wants_binding(pod: Mapping[str, Any]) -> bool:
    spec = pod["spec"]
    return not (
        spec.get("nodeName")
        or spec.get("schedulingGates")
        or pod["metadata"].get("deletionTimestamp")
        or spec.get("schedulerName", SCHEDULER) != SCHEDULER
        or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    )


def holds_resources(pod: Mapping[str, Any]) -> bool:
    return bool(pod["spec"].get("nodeName")) and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


class Binder:
    """Watches pods and nodes and binds. Start it once per cluster; `close()` ends it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._recorder = Recorder(client, SCHEDULER, "", now)
        self._pods: dict[str, Object] = {}
        self._nodes: dict[str, Object] = {}
        self._told: dict[str, str] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            spawn(self._watch_pods(), "binder: pods"),
            spawn(self._watch_nodes(), "binder: nodes"),
            spawn(self._bind_all(), "binder"),
        ]

    async def close(self) -> None:
        await cancel(self._tasks)

    async def _watch_pods(self) -> None:
        async for change in self._client.changes(PODS):
            if change.type == "DELETED":
                self._pods.pop(change.object["metadata"]["uid"], None)
                self._told.pop(change.object["metadata"]["uid"], None)
            elif change.object:
                self._keep(change.object)
            self._wake.set()

    def _keep(self, pod: Object) -> None:
        """An event from before our own binding must not undo it in the cache."""
        uid = pod["metadata"]["uid"]
        known = self._pods.get(uid)
        if known and known["spec"].get("nodeName") and not pod["spec"].get("nodeName"):
            return
        self._pods[uid] = pod

    async def _watch_nodes(self) -> None:
        async for change in self._client.changes(NODES):
            if change.type == "DELETED":
                self._nodes.pop(change.object["metadata"]["name"], None)
            elif change.object:
                self._nodes[change.object["metadata"]["name"]] = change.object
            self._wake.set()

    async def _bind_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            waiting = [pod for pod in self._pods.values() if wants_binding(pod)]
            used = usage(pod for pod in self._pods.values() if holds_resources(pod)) if waiting else {}
            for pod in sorted(waiting, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
                try:
                    await self._schedule(pod, used)
                except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                    log.warning("pod %s was not bound: %s", pod["metadata"]["name"], error)
                    asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._wake.set)

    async def _schedule(self, pod: Object, used: dict[str, Resources]) -> None:
        """Binds a pod where it fits, and adds it to what is used."""
        metadata = pod["metadata"]
        decision = decide(pod, list(self._nodes.values()), used)
        if decision.node is None:
            await self._report(pod, decision.message)
            return
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": decision.node},
        }
        try:
            await self._client.create(PODS, metadata["namespace"], binding, "binding", metadata["name"])
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            return  # gone, or bound by another; its event is on the way
        used[decision.node] = add([used.get(decision.node, {}), pod_requests(pod)])
        self._keep(pod | {"spec": pod["spec"] | {"nodeName": decision.node}})

    async def _report(self, pod: Object, message: str) -> None:
        metadata = pod["metadata"]
        if self._told.get(metadata["uid"]) == message:
            return
        self._told[metadata["uid"]] = message
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
            "lastTransitionTime": now(),
        }
        body = {"metadata": {"uid": metadata["uid"]}, "status": {"conditions": [condition]}}
        name, namespace = metadata["name"], metadata["namespace"]
        await until_done(
            lambda: self._client.patch(PODS, namespace, name, body, "status", STRATEGIC_PATCH),
            f"pod {namespace}/{name}",
            lambda: False,
        )
        await self._recorder.event(pod, PODS, "Warning", "FailedScheduling", message)
