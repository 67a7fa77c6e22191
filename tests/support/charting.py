"""The chart as Helm renders it, offline, and its documents by what they are."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python.chart as helm
import yaml

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "finetune-operator"
RELEASE, NAMESPACE = "ft", "finetune-system"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def _rendered(values: str, name: str, namespace: str) -> str:
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values=json.loads(values), name=name, namespace=namespace)
    documents = (yaml.load_all(text, LOADER) for path, text in sorted(files.items()) if path.endswith(".yaml"))
    return json.dumps([document for group in documents for document in group if document])


def render(values: Mapping[str, Any] | None = None, name: str = RELEASE, namespace: str = NAMESPACE) -> list[Object]:
    """Every manifest of a release."""
    manifests: list[Object] = json.loads(_rendered(json.dumps(values or {}), name, namespace))
    return manifests


def of_kind(manifests: Iterable[Object], kind: str) -> list[Object]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def rules_of(manifests: Iterable[Object], account: str) -> Iterator[tuple[str | None, Object]]:
    """The RBAC rules that hold for a ServiceAccount of the release, with the namespace that they hold in; None: all."""
    manifests = list(manifests)
    for binding in of_kind(manifests, "RoleBinding") + of_kind(manifests, "ClusterRoleBinding"):
        if not any(subject["name"] == account for subject in binding["subjects"]):
            continue
        ref, where = binding["roleRef"], binding["metadata"].get("namespace")
        (role,) = (
            role
            for role in of_kind(manifests, ref["kind"])
            if role["metadata"]["name"] == ref["name"]
            and (ref["kind"] == "ClusterRole" or role["metadata"]["namespace"] == where)
        )
        for rule in role["rules"]:
            yield where, rule
