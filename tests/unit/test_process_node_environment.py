"""What a container's process is told."""

import base64
from typing import Any

import pytest

from finetune_sandbox.environment import (
    ConfigError,
    Mount,
    Place,
    environment,
    expand,
    field_value,
    invocation,
    own_address,
    pod_address,
    resolve_pod_name,
    resource_value,
    rewrite,
)

Obj = dict[str, Any]
PLACE = Place("n1", "127.0.0.1", "127.9.9.9", "seed", {"cpu": "4", "memory": "8Gi"})
MOUNTS = [Mount("/work", "/host/w"), Mount("/work/cache", "/host/c"), Mount("/etc/finetune/", "/host/e")]


def make_pod(**spec: Any) -> Obj:
    metadata = {
        "name": "p",
        "namespace": "ns",
        "uid": "u1",
        "labels": {"app": "x", "batch.kubernetes.io/job-completion-index": "3"},
        "annotations": {"quoted": 'a "b"\nc'},
    }
    return {"metadata": metadata, "spec": {"containers": [{"name": "main"}]} | spec}


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)/x", "1/x"),
        ("$(A)$(B)", "12"),
        ("$$(A)", "$(A)"),
        ("$(MISSING)", "$(MISSING)"),
        ("$A ${A} $", "$A ${A} $"),
        ("$$$(A)", "$1"),
    ],
)
def test_expansion(text: str, expanded: str) -> None:
    assert expand(text, {"A": "1", "B": "2"}) == expanded


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("/work", "/host/w"),
        ("/work/", "/host/w/"),
        ("/work/a", "/host/w/a"),
        ("/work/cache/b", "/host/c/b"),
        ("/workshop", "/workshop"),
        ("--path=/work", "--path=/work"),
        ("/etc/finetune/run.json", "/host/e/run.json"),
        ("/etc/finetune", "/host/e"),
        ("/", "/"),
    ],
)
def test_paths_below_a_mount_become_host_paths(text: str, rewritten: str) -> None:
    assert rewrite(text, MOUNTS) == rewritten


@pytest.mark.parametrize("suffix", ["", ".cluster.local"])
def test_a_pod_name_is_the_address_that_the_pod_will_have(suffix: str) -> None:
    pod = make_pod(hostname="j-0-0", subdomain="j-0")
    address = own_address("seed", pod)
    assert resolve_pod_name(f"j-0-0.j-0.ns.svc{suffix}", "seed") == address
    assert address.startswith("127.")
    assert not address.startswith("127.0.")


@pytest.mark.parametrize("text", ["j-0.ns.svc", "http://j-0-0.j-0.ns.svc", "j-0-0.j-0.ns.svc:29500", "a.b.c"])
def test_other_names_stay(text: str) -> None:
    assert resolve_pod_name(text, "seed") == text


def test_addresses_differ_between_pods_namespaces_and_clusters() -> None:
    found = {
        pod_address(seed, namespace, f"j-{job}", f"j-{job}-{index}")
        for seed in ("a", "b")
        for namespace in ("x", "y")
        for job in range(4)
        for index in range(8)
    }
    assert len(found) == 2 * 2 * 4 * 8


def test_a_pod_without_a_subdomain_has_an_address_of_its_own() -> None:
    one, other = make_pod(), make_pod()
    other["metadata"]["uid"] = "u2"
    assert own_address("seed", one) != own_address("seed", other)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "p"),
        ("metadata.uid", "u1"),
        ("metadata.labels['batch.kubernetes.io/job-completion-index']", "3"),
        ("metadata.labels['absent']", ""),
        ("metadata.labels", 'app="x"\nbatch.kubernetes.io/job-completion-index="3"'),
        ("metadata.annotations", 'quoted="a \\"b\\"\\nc"'),
        ("spec.nodeName", "n1"),
        ("spec.serviceAccountName", "default"),
        ("status.podIP", "127.9.9.9"),
        ("status.hostIP", "127.0.0.1"),
    ],
)
def test_downward_api(path: str, value: str) -> None:
    assert field_value(make_pod(), path, PLACE) == value


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"spec\.secret"):
        field_value(make_pod(), "spec.secret", PLACE)


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ({"resource": "limits.cpu"}, "2"),
        ({"resource": "limits.cpu", "divisor": "1m"}, "1500"),
        ({"resource": "requests.cpu"}, "2"),
        ({"resource": "limits.memory", "divisor": "1Gi"}, "8"),
        ({"resource": "requests.memory"}, "0"),
    ],
)
def test_resource_fields(reference: Obj, value: str) -> None:
    container = {"name": "main", "resources": {"limits": {"cpu": "1500m"}}}
    assert resource_value(make_pod(), container, reference, PLACE) == value


SOURCES = {
    ("Secret", "s3"): {"kind": "Secret", "data": {"key": base64.b64encode(b"secret").decode()}},
    ("ConfigMap", "c"): {"kind": "ConfigMap", "data": {"a": "1", "b": "2"}},
    ("Secret", "gone"): None,
}


def ref(kind: str, name: str, key: str, **more: Any) -> Obj:
    return {"name": "V", "valueFrom": {kind: {"name": name, "key": key, **more}}}


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ({"env": [ref("secretKeyRef", "s3", "key")]}, {"V": "secret"}),
        ({"env": [ref("secretKeyRef", "s3", "nokey", optional=True)]}, {}),
        ({"env": [ref("secretKeyRef", "gone", "key", optional=True)]}, {}),
        ({"env": [ref("configMapKeyRef", "c", "a"), {"name": "W", "value": "$(V)$(V)"}]}, {"V": "1", "W": "11"}),
        ({"envFrom": [{"prefix": "P_", "configMapRef": {"name": "c"}}]}, {"P_a": "1", "P_b": "2"}),
        ({"envFrom": [{"secretRef": {"name": "gone", "optional": True}}]}, {}),
        (
            {"envFrom": [{"configMapRef": {"name": "c"}}], "env": [{"name": "a", "value": "own"}]},
            {"a": "own", "b": "2"},
        ),
        ({"env": [{"name": "E"}]}, {"E": ""}),
    ],
)
def test_variables(container: Obj, expected: dict[str, str]) -> None:
    assert environment(make_pod(), container, SOURCES, PLACE) == expected


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({"env": [ref("secretKeyRef", "gone", "key")]}, 'secret "gone" not found'),
        ({"env": [ref("secretKeyRef", "s3", "nokey")]}, "couldn't find key nokey in Secret ns/s3"),
        ({"envFrom": [{"configMapRef": {"name": "absent"}}]}, 'configmap "absent" not found'),
        ({"env": [{"name": "V", "valueFrom": {"fileKeyRef": {}}}]}, 'env "V"'),
    ],
)
def test_what_is_absent_is_named(container: Obj, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        environment(make_pod(), {"name": "main"} | container, SOURCES, PLACE)


def test_invocation() -> None:
    container = {"command": ["python", "$(DIR)/x"], "args": ["/work/cache", "$(N)"], "workingDir": "/work"}
    variables = {"DIR": "/work", "N": "1", "MASTER": "j-0.j.ns.svc", "HOME": "/work/home"}
    call = invocation(make_pod(), container, variables, MOUNTS, PLACE, "/root-of-it")
    assert call.command == ("python", "/host/w/x", "/host/c", "1")
    assert call.working_dir == "/host/w"
    master = pod_address("seed", "ns", "j", "j-0")
    assert call.env == {"HOSTNAME": "p", "DIR": "/host/w", "N": "1", "MASTER": master, "HOME": "/host/w/home"}
    assert invocation(make_pod(), {}, {}, [], PLACE, "/root-of-it").env["HOME"] == "/root-of-it"


def test_a_containers_own_folder_is_not_taken_for_a_mount() -> None:
    # A checkout may lie below a folder that is also some mount's path in the pod.
    assert (
        invocation(make_pod(), {}, {}, MOUNTS, PLACE, "/work/node/pods/p/root").working_dir == "/work/node/pods/p/root"
    )
