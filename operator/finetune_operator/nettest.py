"""PURE. The test of a cluster's NetworkPolicies for one profile: the objects that it takes, and what it shows."""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_api.nettest import DENIED, FREE, PODS, Reach
from finetune_api.profile import FineTuneProfile, NetworkStatus
from finetune_operator import restricted
from finetune_operator.manifests import CONTAINER, PORT
from finetune_operator.network import DNS_RULE

Object = dict[str, Any]
LABEL = "finetune.dev/network-test"
SECONDS = 60
"""How long the pods try."""
AGAIN = datetime.timedelta(days=1)
SOON = datetime.timedelta(hours=1)
"""After a test that showed nothing."""
OVERDUE = datetime.timedelta(minutes=15)
"""Without an end for so long, it shows nothing: no room, no image."""
SLACK = datetime.timedelta(seconds=10)
"""By which the clocks of two nodes may differ."""


def name_of(profile: str) -> str:
    """Of every object of the test; a profile's name may be longer than a label."""
    return f"nettest-{hashlib.sha256(profile.encode()).hexdigest()[:12]}"


def due(profile: FineTuneProfile, now: datetime.datetime) -> bool:
    """Whether it is to be tested: for the first time, after a change, or after a while."""
    known = profile.status.network
    if known is None or known.generation != profile.metadata.generation or known.tested_time is None:
        return True
    return now - known.tested_time >= (SOON if known.enforced == "Unknown" else AGAIN)


def objects(profile: FineTuneProfile, namespace: str) -> tuple[Object, ...]:
    """Service, NetworkPolicy and Job, which comes last."""
    name = name_of(profile.metadata.name)
    labels = {
        "app.kubernetes.io/name": "finetune-nettest",
        "app.kubernetes.io/part-of": "finetune-operator",
        LABEL: name,
    }
    meta: Object = {"name": name, "namespace": namespace, "labels": labels}
    denied = {LABEL: name, "batch.kubernetes.io/job-completion-index": str(DENIED)}
    return (
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": meta,
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {LABEL: name},
                "ports": [{"name": "test", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
            },
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": meta,
            "spec": {
                "podSelector": {"matchLabels": denied},
                "policyTypes": ["Ingress", "Egress"],
                "egress": [DNS_RULE],
            },
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": meta,
            "spec": {
                "completionMode": "Indexed",
                "completions": PODS,
                "parallelism": PODS,
                "backoffLimit": 0,
                "activeDeadlineSeconds": int(OVERDUE.total_seconds()),
                "template": {"metadata": {"labels": labels}, "spec": _pod(profile, name, namespace)},
            },
        },
    )


def _pod(profile: FineTuneProfile, name: str, namespace: str) -> Object:
    def field(variable: str, path: str) -> Object:
        return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    env = [
        field("FINETUNE_WORKER_INDEX", "metadata.labels['batch.kubernetes.io/job-completion-index']"),
        field("FINETUNE_POD_IP", "status.podIP"),
        {"name": "FINETUNE_MASTER_ADDR", "value": f"{name}-0.{name}.{namespace}.svc"},
        {"name": "FINETUNE_MASTER_PORT", "value": str(PORT)},
        {"name": "FINETUNE_NETTEST_SECONDS", "value": str(SECONDS)},
        {"name": "FINETUNE_TERMINATION_LOG", "value": "/dev/termination-log"},
    ]
    container = {
        "name": CONTAINER,
        "image": profile.spec.image,
        "command": ["python", "-m", "finetune_trainer", "nettest"],
        "env": env,
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "terminationMessagePath": "/dev/termination-log",
        "securityContext": restricted.CONTAINER,
    }
    if profile.spec.image_pull_policy:
        container["imagePullPolicy"] = profile.spec.image_pull_policy
    return restricted.POD | {"restartPolicy": "Never", "subdomain": name, "containers": [container]}


def ended(job: Object) -> bool:
    return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in _conditions(job))


def _conditions(job: Object) -> Sequence[Mapping[str, str]]:
    return (job.get("status") or {}).get("conditions") or ()


def verdict(pods: Sequence[Object], generation: int, now: datetime.datetime) -> NetworkStatus:
    """What the pods of a test that has ended show."""

    def status(enforced: Any, message: str) -> NetworkStatus:
        return NetworkStatus(enforced=enforced, message=message, tested_time=now, generation=generation)

    denied, free = (_reach(pods, index) for index in (DENIED, FREE))
    if denied and denied.reached:
        text = "a pod under a policy that allows it DNS alone reached another pod: the network plugin enforces none"
        return status("False", text)
    if denied is None or free is None:
        return status("Unknown", "the test's pods did not all run to their end; it is repeated in an hour")
    if free.reached is None:
        return status("Unknown", "the pod without a policy reached nothing either: that says nothing of the other one")
    if not denied.started - SLACK <= free.reached <= denied.ended + SLACK:
        return status("Unknown", "the pods did not try at the same time; the test is repeated in an hour")
    return status("True", "a pod under a policy reached nothing that it does not allow, and one without did")


def _reach(pods: Sequence[Object], index: int) -> Reach | None:
    for pod in pods:
        if pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index") == str(index):
            for container in (pod.get("status") or {}).get("containerStatuses") or ():
                text = ((container.get("state") or {}).get("terminated") or {}).get("message") or ""
                return Reach.read(text)
    return None
