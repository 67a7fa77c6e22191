"""A Job's podFailurePolicy: which rule, if any, a failed pod matches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Match:
    """`action` is FailJob, Ignore or Count; `message` is Kubernetes' own sentence."""

    action: str
    message: str


def match(policy: Object | None, pod: Object) -> Match | None:
    """The first rule that the pod matches, in the order of the policy."""
    who = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    for number, rule in enumerate((policy or {}).get("rules") or []):
        ending = f"matching {rule['action']} rule at index {number}"
        if "onExitCodes" in rule:
            for name, code in _exit_codes(pod):
                if _matches_code(rule["onExitCodes"], name, code):
                    message = f"Container {name} for pod {who} failed with exit code {code} {ending}"
                    return Match(rule["action"], message)
        for pattern in rule.get("onPodConditions") or []:
            if _has_condition(pod, pattern):
                return Match(rule["action"], f"Pod {who} has condition {pattern['type']} {ending}")
    return None


def _exit_codes(pod: Object) -> Iterator[tuple[str, int]]:
    status = pod.get("status") or {}
    for record in [*(status.get("containerStatuses") or []), *(status.get("initContainerStatuses") or [])]:
        terminated = (record.get("state") or {}).get("terminated")
        if terminated and terminated["exitCode"] != 0:
            yield record["name"], terminated["exitCode"]


def _matches_code(requirement: Object, name: str, code: int) -> bool:
    if requirement.get("containerName") not in (None, name):
        return False
    listed = code in requirement["values"]
    return listed if requirement["operator"] == "In" else not listed


def _has_condition(pod: Object, pattern: Object) -> bool:
    wanted = pattern["type"], pattern.get("status") or "True"
    return any((c["type"], c["status"]) == wanted for c in (pod.get("status") or {}).get("conditions") or [])
