"""What a kubelet reports about a pod, as a pure function of its containers' states.

Rules and words are those of kubelet_pods.go (`getPhase`) and status/generate.go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Object = Mapping[str, Any]
OWNED_CONDITIONS = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled")
TERMINAL = ("Succeeded", "Failed")


@dataclass(frozen=True)
class Container:
    """One container's record: `state` and `last_state` are ContainerState objects of the API."""

    name: str
    image: str
    init: bool = False
    container_id: str = ""
    restarts: int = 0
    state: Object = field(default_factory=lambda: {"waiting": {"reason": "PodInitializing"}})
    last_state: Object = field(default_factory=dict)

    @property
    def exit_code(self) -> int | None:
        """None while it runs or waits."""
        terminated = self.state.get("terminated")
        return int(terminated["exitCode"]) if terminated else None

    @property
    def running(self) -> bool:
        return "running" in self.state


@dataclass(frozen=True)
class PodFacts:
    """`verdict`, once set, is the final (reason, message) of a pod that failed as a whole: a deadline, a lost node."""

    containers: Sequence[Container]
    restart_policy: str
    start_time: str
    host_ip: str
    pod_ip: str
    prepared: bool = False
    verdict: tuple[str, str] | None = None
    stopped: bool = False
    """Everything that was to run has ended, and nothing will be started again (the pod is being deleted)."""


def timestamp(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def phase(facts: PodFacts) -> str:
    if facts.verdict:
        return "Failed" if not any(container.running for container in facts.containers) else "Running"
    codes = [container.exit_code for container in facts.containers if not container.init]
    if facts.stopped:
        return "Succeeded" if codes and all(code == 0 for code in codes) else "Failed"
    init = [container for container in facts.containers if container.init]
    if any(container.exit_code for container in init) and facts.restart_policy == "Never":
        return "Failed"
    if any(container.exit_code != 0 for container in init):
        return "Pending"
    started = [container for container in facts.containers if not container.init and _has_run(container)]
    if len(started) < len(codes):
        return "Pending" if not any(container.running for container in started) else "Running"
    if any(code is None for code in codes) or facts.restart_policy == "Always":
        return "Running"
    if all(code == 0 for code in codes):
        return "Succeeded"
    return "Failed" if facts.restart_policy == "Never" else "Running"


def _has_run(container: Container) -> bool:
    return "waiting" not in container.state or bool(container.last_state)


def container_status(container: Container, finished: bool) -> dict[str, Any]:
    ready = container.exit_code == 0 if container.init else container.running and not finished
    return {
        "name": container.name,
        "image": container.image,
        "imageID": "",
        "ready": ready,
        "started": container.running,
        "restartCount": container.restarts,
        "state": dict(container.state),
        "lastState": dict(container.last_state),
    } | ({"containerID": container.container_id} if container.container_id else {})


def pod_status(facts: PodFacts, old: Object, now: str) -> dict[str, Any]:
    """The status to write over `old`; conditions keep their transition times, and those of others are left out."""
    current = phase(facts)
    finished = current in TERMINAL
    status: dict[str, Any] = {
        "phase": current,
        "hostIP": facts.host_ip,
        "hostIPs": [{"ip": facts.host_ip}],
        "podIP": facts.pod_ip,
        "podIPs": [{"ip": facts.pod_ip}],
        "startTime": facts.start_time,
        "qosClass": old.get("qosClass") or "BestEffort",
        "conditions": _conditions(facts, current, old.get("conditions") or [], now),
        "containerStatuses": [container_status(c, finished) for c in facts.containers if not c.init],
    }
    if init := [container_status(c, finished) for c in facts.containers if c.init]:
        status["initContainerStatuses"] = init
    if facts.verdict and finished:
        status["reason"], status["message"] = facts.verdict
    return status


def _conditions(facts: PodFacts, current: str, old: Sequence[Object], now: str) -> list[dict[str, Any]]:
    init = [c.name for c in facts.containers if c.init and c.exit_code != 0]
    unready = [c.name for c in facts.containers if not c.init and not c.running]
    if current in TERMINAL:
        reason = "PodCompleted" if current == "Succeeded" else "PodFailed"
        ready = (False, reason, "")
        done = (True, reason if current == "Succeeded" else "", "") if not init else _incomplete(init)
    else:
        ready = (not unready, "ContainersNotReady", f"containers with unready status: [{' '.join(unready)}]")
        done = (True, "", "") if not init else _incomplete(init)
    wanted = {
        "PodReadyToStartContainers": (facts.prepared and current not in TERMINAL, "", ""),
        "Initialized": done,
        "Ready": ready,
        "ContainersReady": ready,
        "PodScheduled": (True, "", ""),
    }
    previous = {entry["type"]: entry for entry in old}
    return [condition(kind, *fact, previous.get(kind), now) for kind, fact in wanted.items()]


def _incomplete(names: Sequence[str]) -> tuple[bool, str, str]:
    return False, "ContainersNotInitialized", f"containers with incomplete status: [{' '.join(names)}]"


def condition(kind: str, true: bool, reason: str, message: str, previous: Object | None, now: str) -> dict[str, Any]:
    """A pod condition. Reasons of readiness are told only where it is false, as a kubelet does.

    An empty reason is written out, since a strategic patch would otherwise leave the one before.
    """
    value = "True" if true else "False"
    since = previous["lastTransitionTime"] if previous and previous.get("status") == value else None
    told = not true or reason == "PodCompleted"
    return {
        "type": kind,
        "status": value,
        "lastTransitionTime": since or now,
        "reason": reason if told else "",
        "message": message if told else "",
    }
