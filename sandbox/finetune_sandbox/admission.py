"""What the API server's own admission does to new pods: service account, priority, runtime class."""

from __future__ import annotations

from typing import Any

from finetune_sandbox.errors import Obj, forbidden
from finetune_sandbox.meta import random_suffix
from finetune_sandbox.resources import Resource
from finetune_sandbox.store import Filter, Store

TOKEN_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
PRIORITIES = "priorityclasses.scheduling.k8s.io"


class Admission:
    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, resource: Resource, obj: Obj) -> None:
        if resource.key == "pods" and isinstance(obj.get("spec"), dict):
            self._account(resource, obj)
            self._priority(resource, obj)
            self._runtime_class(resource, obj)

    def _account(self, resource: Resource, pod: Obj) -> None:
        spec, data = pod["spec"], pod["metadata"]
        name = spec.get("serviceAccountName") or spec.get("serviceAccount") or "default"
        spec["serviceAccountName"] = spec["serviceAccount"] = name
        account = self.store.get("serviceaccounts", data["namespace"], name)
        if account is None:
            where = f"{data['namespace']}/{name}"
            why = f'error looking up service account {where}: serviceaccount "{name}" not found'
            raise forbidden(resource.key, data.get("name", ""), why)
        mounted = spec.get("automountServiceAccountToken", account.obj.get("automountServiceAccountToken", True))
        if mounted:
            _mount_token(spec)
        if not spec.get("imagePullSecrets") and account.obj.get("imagePullSecrets"):
            spec["imagePullSecrets"] = list(account.obj["imagePullSecrets"])

    def _priority(self, resource: Resource, pod: Obj) -> None:
        spec = pod["spec"]
        name = spec.get("priorityClassName")
        if not name:
            every = self.store.tables[PRIORITIES].select(Filter())
            default = [e.obj for e in every if e.obj.get("globalDefault")]
            if default:
                spec["priorityClassName"] = default[0]["metadata"]["name"]
        else:
            entry = self.store.get(PRIORITIES, "", name)
            if entry is None:
                why = f"no PriorityClass with name {name} was found"
                raise forbidden(resource.key, pod["metadata"].get("name", ""), why)
            default = [entry.obj]
        spec["priority"] = default[0]["value"] if default else 0
        spec.setdefault(
            "preemptionPolicy", (default[0] if default else {}).get("preemptionPolicy", "PreemptLowerPriority")
        )

    def _runtime_class(self, resource: Resource, pod: Obj) -> None:
        name = pod["spec"].get("runtimeClassName")
        if name and self.store.get("runtimeclasses.node.k8s.io", "", name) is None:
            why = f'pod rejected: RuntimeClass "{name}" not found'
            raise forbidden(resource.key, pod["metadata"].get("name", ""), why)


def _mount_token(spec: Obj) -> None:
    """Adds the token volume to the containers that mount nothing there yet."""
    mount: Obj = {"name": f"kube-api-access-{random_suffix()}", "readOnly": True, "mountPath": TOKEN_PATH}
    used = False
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        if isinstance(container, dict) and all(
            m.get("mountPath") != TOKEN_PATH for m in container.get("volumeMounts", ())
        ):
            container.setdefault("volumeMounts", []).append(dict(mount))
            used = True
    if used:
        ref = {"apiVersion": "v1", "fieldPath": "metadata.namespace"}
        sources: list[dict[str, Any]] = [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": ref}]}},
        ]
        volume = {"name": mount["name"], "projected": {"sources": sources, "defaultMode": 420}}
        spec.setdefault("volumes", []).append(volume)
