"""The built-in kinds, one row each, and the objects that every cluster starts with."""

from __future__ import annotations

from typing import Any

from finetune_sandbox import builtin, columns, custom, jobkind, podkind, policies, webhooks
from finetune_sandbox.errors import Obj
from finetune_sandbox.gate import REGISTRATION
from finetune_sandbox.identities import built_in
from finetune_sandbox.resources import Resource

_EVENT_FIELDS = (
    *(f"involvedObject.{f}" for f in ("kind", "namespace", "name", "uid", "apiVersion", "fieldPath")),
    "reason",
    "reportingComponent",
    "type",
)
_POD_FIELDS = (
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "status.phase",
    "status.podIP",
    "status.nominatedNodeName",
)
_RBAC = "rbac.authorization.k8s.io"

BUILTIN: tuple[Resource, ...] = (
    Resource("", "v1", "namespaces", "Namespace", False, ("ns",), fields=("status.phase",), status=True, names="label",
             subresources=("finalize",), default=builtin.namespace, prepare=builtin.new_namespace,
             columns=columns.NAMESPACE),
    Resource("", "v1", "pods", "Pod", True, ("po",), ("all",), _POD_FIELDS, status=True, generation=True,
             subresources=("binding", "eviction", "log"), default=podkind.default, prepare=podkind.prepare,
             validate=podkind.validate, columns=columns.POD),
    Resource("", "v1", "services", "Service", True, ("svc",), ("all",), ("spec.clusterIP", "spec.type"), status=True,
             names="label1035", default=builtin.service, prepare=builtin.new_service, validate=builtin.check_service,
             columns=columns.SERVICE),
    Resource("", "v1", "configmaps", "ConfigMap", True, ("cm",), validate=builtin.check_data, columns=columns.DATA),
    Resource("", "v1", "secrets", "Secret", True, fields=("type",), default=builtin.secret, validate=builtin.check_data,
             columns=columns.SECRET),
    Resource("", "v1", "serviceaccounts", "ServiceAccount", True, ("sa",), subresources=("token",),
             columns=columns.ACCOUNT),
    Resource("", "v1", "events", "Event", True, ("ev",), fields=_EVENT_FIELDS, validate=builtin.check_event,
             columns=columns.EVENT),
    Resource("", "v1", "nodes", "Node", False, ("no",), fields=("spec.unschedulable",), status=True, keeps_status=True,
             default=builtin.node, columns=columns.NODE),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", True, ("pvc",), status=True,
             default=builtin.claim, validate=builtin.check_claim, columns=columns.CLAIM),
    Resource("", "v1", "resourcequotas", "ResourceQuota", True, ("quota",), status=True),
    Resource("batch", "v1", "jobs", "Job", True, (), ("all",), ("status.successful",), status=True, generation=True,
             default=jobkind.default, prepare=jobkind.prepare, validate=jobkind.validate, columns=columns.JOB),
    Resource("batch", "v1", "cronjobs", "CronJob", True, ("cj",), ("all",), status=True, generation=True),
    Resource("apps", "v1", "deployments", "Deployment", True, ("deploy",), ("all",), status=True, generation=True),
    Resource(REGISTRATION, "v1", "validatingadmissionpolicies", "ValidatingAdmissionPolicy", False, status=True,
             generation=True, validate=policies.validate),
    Resource(REGISTRATION, "v1", "validatingadmissionpolicybindings", "ValidatingAdmissionPolicyBinding", False,
             generation=True, validate=policies.validate_binding),
    Resource(REGISTRATION, "v1", "validatingwebhookconfigurations", "ValidatingWebhookConfiguration", False,
             generation=True, default=webhooks.default, validate=webhooks.validate),
    Resource("coordination.k8s.io", "v1", "leases", "Lease", True, columns=columns.LEASE),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", True, ("netpol",), generation=True,
             default=builtin.network_policy, validate=builtin.check_network_policy, columns=columns.NETWORK_POLICY),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", True, ("pdb",), status=True,
             generation=True, validate=builtin.check_budget),
    Resource(_RBAC, "v1", "roles", "Role", names="path", validate=builtin.check_role),
    Resource(_RBAC, "v1", "rolebindings", "RoleBinding", names="path", default=builtin.binding,
             validate=builtin.check_binding),
    Resource(_RBAC, "v1", "clusterroles", "ClusterRole", False, names="path", validate=builtin.check_role),
    Resource(_RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", False, names="path", default=builtin.binding,
             validate=builtin.check_binding),
    Resource("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", False, ("pc",), generation=True,
             default=builtin.priority, validate=builtin.check_priority, columns=columns.PRIORITY),
    Resource("node.k8s.io", "v1", "runtimeclasses", "RuntimeClass", False, validate=builtin.check_runtime_class),
    Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", False,
             ("crd", "crds"), ("api-extensions",), status=True, generation=True, default=custom.default,
             prepare=custom.prepare, validate=custom.validate, columns=columns.CRD),
)  # fmt: skip


def _role(name: str, *rules: Obj) -> tuple[str, str, Obj]:
    return (f"clusterroles.{_RBAC}", "", {"metadata": {"name": name}, "rules": list(rules)})


def _bound(name: str, *groups: str) -> tuple[str, str, Obj]:
    subjects = [{"kind": "Group", "apiGroup": _RBAC, "name": g} for g in groups]
    ref = {"apiGroup": _RBAC, "kind": "ClusterRole", "name": name}
    return (f"clusterrolebindings.{_RBAC}", "", {"metadata": {"name": name}, "subjects": subjects, "roleRef": ref})


def _reviews(group: str, *resources: str) -> dict[str, Any]:
    return {"verbs": ["create"], "apiGroups": [group], "resources": list(resources)}


_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
_PUBLIC = ["/healthz", "/livez", "/readyz", "/version", "/version/"]
_DISCOVERY = [*_PUBLIC, "/api", "/api/*", "/apis", "/apis/*", "/openapi", "/openapi/*"]

DEFAULTS: tuple[tuple[str, str, Obj], ...] = (
    *(("namespaces", "", {"metadata": {"name": n}}) for n in _NAMESPACES),
    *(
        ("priorityclasses.scheduling.k8s.io", "", {"metadata": {"name": n}, "value": v})
        for n, v in (("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000))
    ),
    _role(
        "cluster-admin",
        {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]},
        {"verbs": ["*"], "nonResourceURLs": ["*"]},
    ),
    _bound("cluster-admin", "system:masters"),
    _role("system:discovery", {"verbs": ["get"], "nonResourceURLs": _DISCOVERY}),
    _bound("system:discovery", "system:authenticated"),
    _role("system:public-info-viewer", {"verbs": ["get"], "nonResourceURLs": _PUBLIC}),
    _bound("system:public-info-viewer", "system:authenticated", "system:unauthenticated"),
    _role(
        "system:basic-user",
        _reviews("authorization.k8s.io", "selfsubjectaccessreviews", "selfsubjectrulesreviews"),
        _reviews("authentication.k8s.io", "selfsubjectreviews"),
    ),
    _bound("system:basic-user", "system:authenticated"),
    _role(
        "system:auth-delegator",
        _reviews("authentication.k8s.io", "tokenreviews"),
        _reviews("authorization.k8s.io", "subjectaccessreviews"),
    ),
    *built_in(),
)
