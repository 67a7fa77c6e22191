"""The accounts of what runs in every cluster, and what each may do: admission tells them apart by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_sandbox.auth import RBAC, User, service_account
from finetune_sandbox.errors import Obj


def controller(name: str) -> User:
    """A controller of the controller manager, where each has an account of its own."""
    return service_account("kube-system", name)


GARBAGE_COLLECTOR = controller("generic-garbage-collector")
JOB_CONTROLLER = controller("job-controller")
NAMESPACE_CONTROLLER = controller("namespace-controller")
POD_COLLECTOR = controller("pod-garbage-collector")
SCHEDULER = User("system:kube-scheduler", ("system:authenticated",))
NODES = "system:nodes"


def node(name: str) -> User:
    """The kubelet of a node."""
    return User(f"system:node:{name}", (NODES, "system:authenticated"))


def _rule(group: str, resources: Sequence[str], *verbs: str) -> Obj:
    return {"apiGroups": [group], "resources": list(resources), "verbs": list(verbs)}


_READ = ("get", "list", "watch")
_EVENTS = _rule("", ["events"], "create", "patch", "update")
NODE_RULES: Sequence[Obj] = (
    _EVENTS,
    _rule("", ["pods"], *_READ, "delete", "patch"),
    _rule("", ["pods/status", "nodes/status"], "patch", "update"),
    _rule("", ["nodes"], *_READ, "create", "patch", "update"),
    _rule("", ["configmaps", "namespaces", "secrets", "serviceaccounts"], *_READ),
    _rule("", ["serviceaccounts/token"], "create"),
    _rule("coordination.k8s.io", ["leases"], *_READ, "create", "patch", "update"),
)
"""Of a node that is a process of this machine. A real kubelet's rights end at its own pods."""
SCHEDULER_RULES: Sequence[Obj] = (
    _EVENTS,
    _rule("", ["nodes", "pods"], *_READ),
    _rule("", ["pods/binding"], "create"),
    _rule("", ["pods/status"], "patch", "update"),
)
_JOB_RULES: Sequence[Obj] = (
    _EVENTS,
    _rule("batch", ["jobs"], *_READ, "delete", "patch", "update"),
    _rule("batch", ["jobs/status"], "update"),
    _rule("", ["pods"], *_READ, "create", "delete", "patch"),
    # A pod that was deleted before it had a node: elsewhere another controller ends it.
    _rule("", ["pods/status"], "patch"),
)


_OWN: Sequence[tuple[str, Sequence[str]]] = (
    ("", ["configmaps", "events", "persistentvolumeclaims", "pods", "secrets", "serviceaccounts", "services"]),
    ("", ["pods/attach", "pods/exec", "pods/portforward", "pods/proxy", "services/proxy"]),
    ("apps", ["deployments"]),
    ("batch", ["cronjobs", "jobs"]),
    ("coordination.k8s.io", ["leases"]),
    ("networking.k8s.io", ["networkpolicies"]),
    ("policy", ["poddisruptionbudgets"]),
)
EDIT: Sequence[Obj] = (
    *(_rule(group, names, *_READ, "create", "delete", "deletecollection", "patch", "update") for group, names in _OWN),
    _rule("", ["pods/eviction", "serviceaccounts/token"], "create"),
    _rule("", ["serviceaccounts"], "impersonate"),
    _rule("", ["bindings", "events", "namespaces", "pods/log", "pods/status", "resourcequotas"], *_READ),
    _rule("batch", ["cronjobs/status", "jobs/status"], *_READ),
)
"""What the ClusterRole `edit` has of the kinds that are served here: bound in a namespace, a tenant's rights."""


def grant(name: str, rules: Sequence[Mapping[str, Any]], subject: Obj) -> Iterator[tuple[str, str, Obj]]:
    """A ClusterRole and its binding, each with the key of its kind and the namespace."""
    yield f"clusterroles.{RBAC}", "", {"metadata": {"name": name}, "rules": list(rules)}
    ref = {"apiGroup": RBAC, "kind": "ClusterRole", "name": name}
    binding = {"metadata": {"name": name}, "roleRef": ref, "subjects": [{"apiGroup": RBAC, **subject}]}
    yield f"clusterrolebindings.{RBAC}", "", binding


def built_in() -> Iterator[tuple[str, str, Obj]]:
    """What a cluster grants its own controllers from the start, and the role of those who work in a namespace."""
    yield f"clusterroles.{RBAC}", "", {"metadata": {"name": "edit"}, "rules": list(EDIT)}
    yield from grant("system:controller:job-controller", _JOB_RULES, {"kind": "User", "name": JOB_CONTROLLER.name})
    yield from grant(SCHEDULER.name, SCHEDULER_RULES, {"kind": "User", "name": SCHEDULER.name})
