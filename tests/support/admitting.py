"""The layers of admission as the chart installs them, each by itself, for one namespace of an API server."""

import base64
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_operator.admission import AdmissionOptions, AdmissionServer
from finetune_operator.cluster import KubeCluster
from finetune_operator.metrics import Metrics
from finetune_operator.profiles import Profiles
from finetune_operator.webhook_paths import Entry
from finetune_operator.webhook_paths import render as render_paths
from support.api import Api, Object
from support.charting import of_kind, render

REGISTRATION = "/apis/admissionregistration.k8s.io/v1"
PLURALS = {
    "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings",
    "ValidatingWebhookConfiguration": "validatingwebhookconfigurations",
}
RBAC = "/apis/rbac.authorization.k8s.io/v1"


PATH = "/validate/" + "p" * 43
"""What the API server is told, and nobody else."""


def paths_file(folder: Path) -> Path:
    """The file that tells the operator of PATH; it lies beside `folder`, which is the certificate's."""
    file = folder.parent / f"{folder.name}-paths.json"
    file.write_bytes(render_paths([Entry(PATH, datetime.now(UTC))]))
    return file


@asynccontextmanager
async def webhook_server(
    cluster: KubeCluster, folder: Path, **options: Any
) -> AsyncIterator[tuple[AdmissionServer, Metrics]]:
    """The webhook's server on a port of the kernel's choice; its authority is `folder`/ca.crt, and PATH its path."""
    options = {"paths_file": paths_file(folder)} | options
    given = AdmissionOptions(folder, ("127.0.0.1",), host="127.0.0.1", port=0, **options)
    metrics = Metrics()
    server = AdmissionServer(cluster, Profiles(cluster), given, metrics)
    await server.start()
    try:
        yield server, metrics
    finally:
        await server.stop()


@asynccontextmanager
async def registered(api: Api, manifests: list[Object]) -> AsyncIterator[None]:
    """These policies, bindings or webhooks, until the end."""
    paths = [f"{REGISTRATION}/{PLURALS[manifest['kind']]}" for manifest in manifests]
    for path, manifest in zip(paths, manifests, strict=True):
        (await api.create(path, manifest)).must(201)
    try:
        yield
    finally:
        for path, manifest in zip(paths, manifests, strict=True):
            await api.delete(f"{path}/{manifest['metadata']['name']}")


def policies(namespace: str, system: str | None = None, **values: Any) -> tuple[str, list[Object]]:
    """The chart's policies for jobs of one namespace, where the operator runs too or in `system`; and the operator's
    account. `values` are those of admission.policies."""
    release = f"ft-{secrets.token_hex(4)}"
    given = {"watchNamespaces": [namespace], "admission": {"policies": values}}
    manifests = render(given, release, system or namespace)
    found = of_kind(manifests, "ValidatingAdmissionPolicy") + of_kind(manifests, "ValidatingAdmissionPolicyBinding")
    return release, found


def webhooks(namespace: str, url: str, ca: bytes) -> list[Object]:
    """The chart's webhooks for jobs of one namespace, reached at `url` instead of by a Service."""
    manifests = render({"watchNamespaces": [namespace]}, f"ft-{secrets.token_hex(4)}", namespace)
    (configuration,) = of_kind(manifests, "ValidatingWebhookConfiguration")
    for webhook in configuration["webhooks"]:
        webhook["clientConfig"] = {"url": url, "caBundle": base64.b64encode(ca).decode()}
    # Those of profiles are all of the cluster's, other tests' too.
    configuration["webhooks"] = configuration["webhooks"][:1]
    return [configuration]


async def tenant(api: Api, namespace: str, name: str, rules: list[Object]) -> str:
    """A token of a ServiceAccount with these rights in the namespace."""
    (await api.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": name}})).must(201)
    base = f"{RBAC}/namespaces/{namespace}"
    (await api.create(f"{base}/roles", {"metadata": {"name": name}, "rules": rules})).must(201)
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    subjects = [{"kind": "ServiceAccount", "name": name, "namespace": namespace}]
    binding = {"metadata": {"name": name}, "roleRef": ref, "subjects": subjects}
    (await api.create(f"{base}/rolebindings", binding)).must(201)
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
    token: str = (await api.create(path, {"spec": {"expirationSeconds": 3600}})).must(201)["status"]["token"]
    return token
