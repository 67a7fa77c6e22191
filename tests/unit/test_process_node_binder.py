"""Where pods go, and why they do not."""

from fractions import Fraction
from typing import Any

import pytest

from finetune_sandbox.binder import decide, usage, wants_binding
from finetune_sandbox.cgroup import parse_own
from finetune_sandbox.devices import Devices, DevicesTaken
from finetune_sandbox.quantity import parse, pod_requests

Obj = dict[str, Any]
GPU = "nvidia.com/gpu"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        (2, 2),
        ("500m", Fraction(1, 2)),
        ("1.5", Fraction(3, 2)),
        (".5", Fraction(1, 2)),
        ("1k", 1000),
        ("76536928Ki", 76536928 * 1024),
        ("8Gi", 8 * 2**30),
        ("1e3", 1000),
        ("100u", Fraction(1, 10000)),
    ],
)
def test_quantities(text: str | int, value: Fraction) -> None:
    assert parse(text) == value


@pytest.mark.parametrize("text", ["", "x", "1 Gi", "1mi", "1K", "--1"])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        parse(text)


def make_node(name: str = "n1", **more: Any) -> Obj:
    conditions = [{"type": "Ready", "status": more.pop("ready", "True")}]
    allocatable = {"cpu": "4", "memory": "8Gi", "pods": "3", GPU: "2"} | more.pop("allocatable", {})
    metadata = {"name": name, "labels": more.pop("labels", {})}
    return {"metadata": metadata, "spec": more, "status": {"conditions": conditions, "allocatable": allocatable}}


def make_pod(node: str = "", requests: Obj | None = None, **spec: Any) -> Obj:
    container = {"name": "main", "resources": {"requests": requests or {}}}
    return {"metadata": {"name": "p"}, "spec": {"nodeName": node, "containers": [container]} | spec, "status": {}}


def requiring(kind: str, key: str, operator: str, *values: str) -> Obj:
    """A pod with one requirement on its node."""
    rule = {"key": key, "operator": operator} | ({"values": list(values)} if values else {})
    terms = {"nodeSelectorTerms": [{kind: [rule]}]}
    return make_pod(affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}})


@pytest.mark.parametrize(
    ("pod", "node"),
    [
        (requiring("matchFields", "metadata.name", "NotIn", "n1"), "n2"),
        (requiring("matchFields", "metadata.name", "In", "n1"), "n1"),
        (requiring("matchExpressions", "a", "In", "b", "c"), "n2"),
        (requiring("matchExpressions", "a", "NotIn", "c"), "n1"),
        (requiring("matchExpressions", "a", "Exists"), "n2"),
        (requiring("matchExpressions", "a", "DoesNotExist"), "n1"),
    ],
)
def test_node_affinity(pod: Obj, node: str) -> None:
    assert decide(pod, [make_node("n1"), make_node("n2", labels={"a": "c"})], {}).node == node


def test_requests_are_the_sum_of_containers_or_the_largest_init_container() -> None:
    pod = make_pod(requests={"cpu": "1"})
    pod["spec"]["containers"].append({"name": "b", "resources": {"limits": {"cpu": "500m", GPU: 1}}})
    pod["spec"]["initContainers"] = [{"name": "i", "resources": {"requests": {"cpu": "1", "memory": "1Gi"}}}]
    assert pod_requests(pod) == {"cpu": Fraction(3, 2), GPU: 1, "memory": 2**30, "pods": 1}


TAINT = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("pod", "node", "problem"),
    [
        (make_pod(), make_node(), ""),
        (make_pod(requests={GPU: 2}), make_node(), ""),
        (make_pod(requests={GPU: 3}), make_node(), "1 Insufficient nvidia.com/gpu"),
        (make_pod(requests={"cpu": "5"}), make_node(), "1 Insufficient cpu"),
        (make_pod(requests={"amd.com/gpu": 1}), make_node(), "1 Insufficient amd.com/gpu"),
        (make_pod(), make_node(allocatable={"pods": "0"}), "1 Too many pods"),
        (make_pod(), make_node(unschedulable=True), "1 node(s) were unschedulable"),
        (make_pod(), make_node(ready="False"), "1 node(s) were not ready"),
        (make_pod(), make_node(taints=[TAINT]), "1 node(s) had untolerated taint {gpu: yes}"),
        (make_pod(tolerations=[{"key": "gpu", "operator": "Exists"}]), make_node(taints=[TAINT]), ""),
        (make_pod(tolerations=[{"key": "gpu", "value": "yes"}]), make_node(taints=[TAINT]), ""),
        (make_pod(tolerations=[{"key": "gpu", "value": "no"}]), make_node(taints=[TAINT]), "1 node(s) had untolerated"),
        (make_pod(nodeSelector={"a": "b"}), make_node(labels={"a": "b"}), ""),
        (make_pod(nodeSelector={"a": "b"}), make_node(), "1 node(s) didn't match Pod's node affinity/selector"),
        (requiring("matchFields", "metadata.name", "NotIn", "n1"), make_node(), "1 node(s) didn't match Pod's node"),
        (requiring("matchExpressions", "a", "In", "b"), make_node(labels={"a": "c"}), "1 node(s) didn't match Pod's"),
        (requiring("matchExpressions", "a", "Exists"), make_node(), "1 node(s) didn't match Pod's node"),
        (requiring("matchExpressions", "a", "Gt", "1"), make_node(), "required nodeAffinity by Gt or Lt is not supp"),
        (
            make_pod(affinity={"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}}),
            make_node(),
            "required affinity to pods is not supported",
        ),
    ],
)
def test_fit(pod: Obj, node: Obj, problem: str) -> None:
    decision = decide(pod, [node], {})
    if problem:
        assert decision.node is None
        assert decision.message.startswith(f"0/1 nodes are available: {problem}")
    else:
        assert decision.node == "n1"


def test_bound_pods_take_room_and_the_emptier_node_is_chosen() -> None:
    nodes = [make_node("n1"), make_node("n2")]
    bound = [make_pod("n1", {GPU: 1})]
    assert decide(make_pod(requests={GPU: 1}), nodes, usage(bound)).node == "n2"
    bound = [make_pod("n1", {GPU: 1}), make_pod("n2", {GPU: 2})]
    assert decide(make_pod(requests={GPU: 2}), nodes, usage(bound)).message.startswith(
        "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    )


def test_no_node_at_all() -> None:
    assert decide(make_pod(), [], {}).message == "0/0 nodes are available: no nodes registered."


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, True),
        ({"nodeName": "n1"}, False),
        ({"schedulerName": "kueue"}, False),
        ({"schedulerName": "default-scheduler"}, True),
        ({"schedulingGates": [{"name": "g"}]}, False),
    ],
)
def test_whom_the_binder_serves(change: Obj, wanted: bool) -> None:
    assert wants_binding(make_pod(**change)) is wanted


def test_devices_are_numbered_per_pod_and_given_back() -> None:
    devices = Devices(3)
    pod = make_pod(requests={GPU: 2})
    devices.acquire("a", pod)
    assert devices.variables("a", pod["spec"]["containers"][0]) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert devices.variables("a", {"name": "other"}) == {"CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(DevicesTaken, match="Requested: 2, Available: 1"):
        devices.acquire("b", pod)
    devices.release("a")
    devices.release("never held any")
    devices.acquire("b", pod)
    assert Devices(0).variables("a", pod["spec"]["containers"][0]) == {}


@pytest.mark.parametrize(
    ("own", "mounts", "expected"),
    [
        ("0::/user.slice\n", "c /sys/fs/cgroup cgroup2 rw 0 0\n", ("/sys/fs/cgroup/user.slice", 2)),
        (
            "4:memory:/box\n0::/\n",
            "c /sys/fs/cgroup/memory cgroup rw,memory 0 0\nc /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            ("/sys/fs/cgroup/memory/box", 1),
        ),
        ("4:cpu:/box\n", "c /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", None),
    ],
)
def test_the_memory_cgroup_is_found(own: str, mounts: str, expected: tuple[str, int] | None) -> None:
    layout = parse_own(own, mounts)
    assert (layout and (str(layout.parent), layout.version)) == expected
