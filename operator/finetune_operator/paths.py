"""PURE. URL paths and selectors of the API server, built so that no name can lead a request to another resource."""

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote

from finetune_api import API_VERSION
from finetune_operator.errors import BadName

LONGEST = 253
"""Characters of a name: the longest that the API server gives to any of our kinds."""
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_VERSION = re.compile(r"[a-z0-9]{1,63}")


class Kind(NamedTuple):
    """Where objects of a kind live."""

    api: str
    plural: str
    namespaced: bool = True


KINDS: Mapping[str, Kind] = {
    "FineTuneJob": Kind(f"/apis/{API_VERSION}", "finetunejobs"),
    "FineTuneProfile": Kind(f"/apis/{API_VERSION}", "finetuneprofiles", namespaced=False),
    "Job": Kind("/apis/batch/v1", "jobs"),
    "Pod": Kind("/api/v1", "pods"),
    "Service": Kind("/api/v1", "services"),
    "ConfigMap": Kind("/api/v1", "configmaps"),
    "NetworkPolicy": Kind("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Event": Kind("/api/v1", "events"),
    "Lease": Kind("/apis/coordination.k8s.io/v1", "leases"),
    "TokenReview": Kind("/apis/authentication.k8s.io/v1", "tokenreviews", namespaced=False),
    "SubjectAccessReview": Kind("/apis/authorization.k8s.io/v1", "subjectaccessreviews", namespaced=False),
    # Only for certificates.py, which runs under an account of its own; the operator may do nothing with either.
    "Secret": Kind("/api/v1", "secrets"),
    "ValidatingWebhookConfiguration": Kind(
        "/apis/admissionregistration.k8s.io/v1", "validatingwebhookconfigurations", namespaced=False
    ),
}


def collection(kind: str, namespace: str | None) -> str:
    """Path of the kind's objects in a namespace; None: in all. Raises BadName."""
    api, plural, namespaced = KINDS[kind]
    scope = f"/namespaces/{segment(namespace)}" if namespaced and namespace is not None else ""
    return f"{api}{scope}/{plural}"


def item(kind: str, namespace: str | None, name: str) -> str:
    """Path of one object. Raises BadName, also where a namespaced kind is named without its namespace."""
    if KINDS[kind].namespaced and namespace is None:
        raise BadName(f"{kind} {name!r:.80} has no namespace")
    return f"{collection(kind, namespace)}/{segment(name)}"


def workloads(group_version: str, group: str, namespace: str) -> str:
    """Path of Kueue's Workloads in the version that the server prefers. Raises BadName."""
    found, _, version = group_version.partition("/")
    if found != group or not _VERSION.fullmatch(version):
        raise BadName(f"{group_version!r:.80} is no version of {group}")
    return f"/apis/{group}/{version}/namespaces/{segment(namespace)}/workloads"


def segment(name: str) -> str:
    """The name, quoted. Raises BadName for what the API server refuses as a name, too.

    Quoting is not enough for `/`, `%` and dots: servers and proxies unquote a path before they route it.
    """
    odd = not isinstance(name, str) or not name or len(name) > LONGEST or name in (".", "..")
    if odd or not name.isprintable() or "/" in name or "%" in name or "\\" in name:
        raise BadName(f"{name!r:.80} cannot be the name of an object")
    return quote(name, safe="")


def selector(label: str, value: str) -> str:
    """A label selector for this very value. Raises BadName where it would select by something else."""
    if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
        raise BadName(f"{value!r:.80} cannot be the value of the label {label}")
    return f"{label}={value}"


def plural_of(path: str) -> str:
    """The plural in a path, for metrics."""
    return next((kind.plural for kind in KINDS.values() if f"/{kind.plural}" in path), "other")
