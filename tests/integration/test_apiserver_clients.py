"""The sandbox's API server as the clients see it that people have: kubernetes.aio, kubectl and kopf."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.aio import client, config, watch

from finetune_sandbox.server import ApiServer
from support.waiting import eventually
from support.widgets import SPEC_SCHEMA

pytestmark = pytest.mark.integration
GROUP = "clients.example.com"
COLUMNS = [
    {"name": "Size", "type": "integer", "jsonPath": ".spec.size"},
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "URI", "type": "string", "jsonPath": ".spec.uri", "priority": 1},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]
STATUS = {
    "type": "object",
    "properties": {
        "phase": {"type": "string"},
        "conditions": {"type": "array", "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
    },
}
CRD: dict[str, Any] = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": f"widgets.{GROUP}"},
    "spec": {
        "group": GROUP,
        "scope": "Namespaced",
        "names": {"plural": "widgets", "kind": "Widget", "shortNames": ["wd"], "categories": ["all"]},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "additionalPrinterColumns": COLUMNS,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "description": "A widget of some size.",
                        "properties": {"spec": SPEC_SCHEMA, "status": STATUS},
                    }
                },
            }
        ],
    },
}


def widget(name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": f"{GROUP}/v1", "kind": "Widget", "metadata": {"name": name}, "spec": {"size": 3, **spec}}


def pod(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"containers": [{"name": "main", "image": "example.com/image:1"}]}}


class Lines:
    """A LogSource of three lines."""

    async def stream(
        self, namespace: str, pod: str, container: str, follow: bool, tail_lines: int | None
    ) -> AsyncIterator[bytes]:
        lines = [f"{namespace}/{pod}/{container}: {n}\n".encode() for n in range(3)]
        for line in lines if tail_lines is None else lines[-tail_lines:]:
            yield line


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ApiServer]:
    server = ApiServer()
    await server.start(tmp_path / "server")
    yield server
    await server.stop()


@pytest.fixture
async def api(server: ApiServer) -> AsyncIterator[client.ApiClient]:
    configuration = client.Configuration()
    await config.load_kube_config(str(server.kubeconfig), client_configuration=configuration)
    async with client.ApiClient(configuration) as api:
        core = client.CoreV1Api(api)
        await eventually(lambda: core.list_namespaced_service_account("default"), "accounts", until=lambda a: a.items)
        yield api


@pytest.fixture
async def widgets(api: client.ApiClient) -> client.CustomObjectsApi:
    await client.ApiextensionsV1Api(api).create_custom_resource_definition(CRD)
    return client.CustomObjectsApi(api)


async def test_the_python_client_writes_and_watches(api: client.ApiClient, widgets: client.CustomObjectsApi) -> None:
    where = (GROUP, "v1", "default", "widgets")
    made = await widgets.create_namespaced_custom_object(*where, widget("w"))
    assert made["spec"]["mode"] == "Slow"
    seen: list[tuple[str, Any]] = []
    await widgets.patch_namespaced_custom_object_status(
        *where, "w", {"spec": {"size": 9}, "status": {"phase": "Running"}}, _content_type="application/merge-patch+json"
    )
    await widgets.delete_namespaced_custom_object(*where, "w")
    start = made["metadata"]["resourceVersion"]
    async with watch.Watch() as watcher:
        async for event in watcher.stream(
            widgets.list_namespaced_custom_object, *where, resource_version=start, timeout_seconds=5
        ):
            seen.append((event["type"], event["object"]["status"]["phase"]))
            assert event["object"]["spec"]["size"] == 3, "the status subresource leaves the spec alone"
            if event["type"] == "DELETED":
                break
    assert seen == [("MODIFIED", "Running"), ("DELETED", "Running")]


async def test_typed_models_read_what_is_served(api: client.ApiClient) -> None:
    core, batch = client.CoreV1Api(api), client.BatchV1Api(api)
    spec = {"restartPolicy": "Never", "containers": [{"name": "main", "image": "example.com/image:1"}]}
    job = await batch.create_namespaced_job(
        "default", {"metadata": {"name": "j"}, "spec": {"template": {"spec": spec}}}
    )
    assert job.spec.selector.match_labels == {"batch.kubernetes.io/controller-uid": job.metadata.uid}
    await core.create_namespaced_pod("default", pod("p"))
    [read] = (await core.list_namespaced_pod("default", field_selector="status.phase=Pending")).items
    assert read.status.qos_class == "BestEffort"
    with pytest.raises(client.ApiException) as caught:
        await core.create_namespaced_pod("default", pod("p"))
    assert caught.value.status == 409
    assert json.loads(caught.value.body)["reason"] == "AlreadyExists"


async def test_a_revision_that_is_forgotten_is_gone(server: ApiServer, api: client.ApiClient) -> None:
    core = client.CoreV1Api(api)
    start = (await core.list_namespaced_config_map("default")).metadata.resource_version
    await core.create_namespaced_config_map("default", {"metadata": {"name": "a"}})
    server.store.tables["configmaps"].forget_history(server.store.rev)
    async with watch.Watch() as watcher:
        with pytest.raises(client.ApiException) as caught:
            async for _ in watcher.stream(
                core.list_namespaced_config_map, "default", resource_version=start, timeout_seconds=5
            ):
                pass
    assert caught.value.status == 410


async def test_what_is_not_served_says_so(server: ApiServer, api: client.ApiClient) -> None:
    core = client.CoreV1Api(api)
    await core.create_namespaced_pod("default", pod("p"))
    template = {"metadata": {"labels": {"a": "b"}}, "spec": pod("p")["spec"]}
    daemons = {"metadata": {"name": "d"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": template}}
    hooks = client.AdmissionregistrationV1Api(api)
    refused: tuple[Callable[[], Awaitable[Any]], ...] = (
        lambda: core.read_namespaced_pod_log("p", "default"),
        lambda: core.connect_get_namespaced_pod_exec("p", "default", command=["sh"]),
        lambda: client.AppsV1Api(api).create_namespaced_daemon_set("default", daemons),
        lambda: hooks.create_mutating_webhook_configuration({"metadata": {"name": "w"}}),
    )
    for call in refused:
        with pytest.raises(client.ApiException) as caught:
            await call()
        assert (caught.value.status, json.loads(caught.value.body)["kind"]) == (501, "Status")


class Kubectl:
    def __init__(self, server: ApiServer, home: Path) -> None:
        self._kubeconfig, self._home = str(server.kubeconfig), home
        self.env = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": self._kubeconfig}

    async def __call__(self, *args: str, stdin: str = "") -> str:
        """What it printed. Raises AssertionError with its complaint where it failed."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            "kubectl", *args, stdin=pipe, stdout=pipe, stderr=pipe, env=self.env, cwd=self._home
        )
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 60)
        assert process.returncode == 0, err.decode()
        return out.decode()


@pytest.fixture
async def kubectl(server: ApiServer, api: client.ApiClient, tmp_path: Path) -> Kubectl:
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl")
    return Kubectl(server, tmp_path)


async def test_kubectl_applies_shows_and_explains(kubectl: Kubectl) -> None:
    assert "created" in await kubectl("apply", "-f", "-", stdin=yaml.safe_dump(CRD))
    await kubectl("wait", "--for=condition=Established", f"crd/widgets.{GROUP}", "--timeout=20s")
    for size, said in ((3, "created"), (4, "configured"), (4, "unchanged")):
        text = yaml.safe_dump(widget("w", size=size, uri="s3://b"))
        assert said in await kubectl("apply", "-f", "-", stdin=text)
    head, row = (await kubectl("get", "wd")).splitlines()
    assert head.split() == ["NAME", "SIZE", "PHASE", "AGE"]
    assert row.split()[:2] == ["w", "4"]
    assert "s3://b" in await kubectl("get", "widgets", "-o", "wide")
    explained = await kubectl("explain", "widgets.spec")
    assert "uri" in explained
    assert "<string>" in explained
    assert "A widget of some size." in await kubectl("explain", "widgets")
    assert "Size: 4" in " ".join((await kubectl("describe", "widget", "w")).split())
    assert "serverside-applied" in await kubectl(
        "apply", "--server-side", "--force-conflicts", "-f", "-", stdin=yaml.safe_dump(widget("w", size=5))
    )
    with pytest.raises(AssertionError, match="should be greater than or equal to 1"):
        await kubectl("apply", "-f", "-", stdin=yaml.safe_dump(widget("w", size=0)))
    with pytest.raises(AssertionError, match=r'unknown field "spec\.sise"'):
        await kubectl("apply", "-f", "-", stdin=yaml.safe_dump(widget("v", sise=0)))
    assert "deleted" in await kubectl("delete", "widget", "w")
    assert "deleted" in await kubectl("delete", "crd", f"widgets.{GROUP}")


async def test_kubectl_with_pods(kubectl: Kubectl, server: ApiServer) -> None:
    server.log_source = Lines()
    manifest = {"apiVersion": "v1", "kind": "Pod", **pod("p")}
    await kubectl("apply", "-f", "-", stdin=yaml.safe_dump(manifest))
    head, row = (await kubectl("get", "pods")).splitlines()
    assert head.split() == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]
    assert row.split()[:3] == ["p", "0/1", "Pending"]
    assert await kubectl("logs", "p", "--tail=1") == "default/p/main: 2\n"
    assert len((await kubectl("logs", "-f", "p")).splitlines()) == 3
    assert "example.com/image:1" in await kubectl("describe", "pod", "p")
    assert "p" in await kubectl("get", "all")
    await kubectl("label", "pod", "p", "a=b")
    assert "p" in await kubectl("get", "pods", "-l", "a=b", "-o", "name")
    assert "deleted" in await kubectl("delete", "pod", "p", "--wait")
    assert "Active" in await kubectl("get", "ns", "default")
    assert "kube-root-ca.crt" in await kubectl("get", "configmaps", "-A")


async def test_kubectl_sends_protobuf_where_it_creates_by_itself(kubectl: Kubectl) -> None:
    await kubectl("create", "secret", "generic", "s", "--from-literal=a=b")
    assert await kubectl("get", "secret", "s", "-o", "jsonpath={.data.a}") == "Yg=="
    await kubectl("create", "serviceaccount", "robot")
    token = (await kubectl("create", "token", "robot", "--audience=x", "--duration=20m")).strip()
    assert token.count(".") == 2
    assert await kubectl("auth", "can-i", "create", "pods") == "yes\n"
    with pytest.raises(AssertionError):
        await kubectl("auth", "can-i", "list", "secrets", "--as=system:serviceaccount:default:robot")
    with pytest.raises(AssertionError, match="the sandbox reads Role as JSON or YAML only"):
        await kubectl("create", "role", "r", "--verb=get", "--resource=pods")
    await kubectl("create", "namespace", "n")
    assert "deleted" in await kubectl("delete", "namespace", "n")


async def test_kubectl_follows_a_table(kubectl: Kubectl, server: ApiServer, api: client.ApiClient) -> None:
    process = await asyncio.create_subprocess_exec(
        *("kubectl", "get", "configmaps", "--watch", "--no-headers"), stdout=subprocess.PIPE, env=kubectl.env
    )
    assert process.stdout is not None
    try:
        assert (await asyncio.wait_for(process.stdout.readline(), 30)).split()[:2] == [b"kube-root-ca.crt", b"1"]
        body = {"metadata": {"name": "new"}, "data": {"a": "1", "b": "2"}}
        await client.CoreV1Api(api).create_namespaced_config_map("default", body)
        assert (await asyncio.wait_for(process.stdout.readline(), 30)).split()[:2] == [b"new", b"2"]
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)


async def test_a_service_account_may_do_what_it_is_granted(server: ApiServer, api: client.ApiClient) -> None:
    core, rbac = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
    made = await core.create_namespaced_service_account_token(
        "default", "default", {"spec": {"expirationSeconds": 600}}
    )
    configuration = client.Configuration(host=server.url)
    configuration.ssl_ca_cert = str(server.kubeconfig.parent / "ca.crt")
    configuration.api_key["authorization"] = f"Bearer {made.status.token}"
    async with client.ApiClient(configuration) as theirs:
        account = client.CoreV1Api(theirs)
        with pytest.raises(client.ApiException) as caught:
            await account.list_namespaced_config_map("default")
        assert caught.value.status == 403
        assert 'cannot list resource "configmaps" in API group ""' in json.loads(caught.value.body)["message"]
        rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}]
        await rbac.create_namespaced_role("default", {"metadata": {"name": "r"}, "rules": rules})
        subjects = [{"kind": "ServiceAccount", "name": "default", "namespace": "default"}]
        ref = {"kind": "Role", "name": "r", "apiGroup": "rbac.authorization.k8s.io"}
        binding = {"metadata": {"name": "r"}, "roleRef": ref, "subjects": subjects}
        await rbac.create_namespaced_role_binding("default", binding)
        assert (await account.list_namespaced_config_map("default")).items
        with pytest.raises(client.ApiException) as caught:
            await account.list_namespaced_config_map("kube-system")
        assert caught.value.status == 403
        configuration.api_key["authorization"] = "Bearer nonsense"
        with pytest.raises(client.ApiException) as caught:
            await account.list_namespaced_config_map("default")
        assert caught.value.status == 401


OPERATOR = """
import kopf

@kopf.on.login()
def login(**kwargs):
    return kopf.login_with_kubeconfig(**kwargs)

@kopf.on.startup()
def startup(settings, **_):
    settings.scanning.disabled = True
    settings.posting.enabled = False

@kopf.on.event("{group}", "v1", "widgets")
def seen(type, name, **_):
    print("SEEN", type, name, flush=True)
"""


async def test_a_kopf_operator_sees_every_event(
    server: ApiServer, widgets: client.CustomObjectsApi, tmp_path: Path
) -> None:
    script = tmp_path / "operator.py"
    script.write_text(OPERATOR.format(group=GROUP))
    where = (GROUP, "v1", "default", "widgets")
    await widgets.create_namespaced_custom_object(*where, widget("before"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kopf", "run", "-A", "--quiet", "--standalone", str(script)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "KUBECONFIG": str(server.kubeconfig)},
    )
    assert process.stdout is not None
    said: list[str] = []

    async def until(words: str) -> None:
        assert process.stdout is not None
        while words not in (said[-1] if said else ""):
            line = await asyncio.wait_for(process.stdout.readline(), 60)
            assert line, "".join(said)
            said.append(line.decode())

    try:
        await until("SEEN None before")
        await widgets.create_namespaced_custom_object(*where, widget("after"))
        await until("SEEN ADDED after")
        await widgets.delete_namespaced_custom_object(*where, "after")
        await until("SEEN DELETED after")
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 20)
