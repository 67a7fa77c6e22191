"""The process node: real processes on a real or the sandbox's API server."""

import asyncio
import base64
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_sandbox.binder import Binder
from finetune_sandbox.client import CONFIGMAPS, EVENTS, JOBS, NODES, PODS, SECRETS, ApiError, Client, Object
from finetune_sandbox.node import Node
from finetune_sandbox.up import Sandbox
from support.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

GPU = "nvidia.com/gpu"
FINISHED = ("Succeeded", "Failed")


class Lab:
    """A node, a scheduler and a namespace."""

    def __init__(self, client: Client, namespace: str, node: Node) -> None:
        self.client = client
        self.namespace = namespace
        self.node = node

    async def run(self, script: str = "", name: str = "p", **spec: Any) -> Object:
        """Creates a pod with one container that runs `script`; members of `container` are the container's."""
        container = {"name": "main", "image": "x", "command": ["sh", "-c", script]} | spec.pop("container", {})
        base = {"restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container]}
        return await self.client.create(PODS, self.namespace, {"metadata": {"name": name}, "spec": base | spec})

    async def create_job(self, script: str, name: str = "j", **spec: Any) -> Object:
        container = {"name": "main", "image": "x", "command": ["sh", "-c", script]} | spec.pop("container", {})
        pod = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 5,
            "subdomain": name,
            "containers": [container],
        }
        gang = {
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {"spec": pod},
        }
        return await self.client.create(JOBS, self.namespace, {"metadata": {"name": name}, "spec": gang | spec})

    async def pod(self, name: str = "p") -> Object:
        return await self.client.get(PODS, self.namespace, name)

    async def until(self, what: str, accept: Callable[[Object], object], name: str = "p") -> Object:
        return await eventually(lambda: self.pod(name), what, until=accept, timeout=30)

    async def end(self, name: str = "p") -> Object:
        return await self.until("end of the pod", lambda pod: pod["status"]["phase"] in FINISHED, name)

    async def gone(self, name: str = "p") -> None:
        async def absent() -> bool:
            try:
                await self.pod(name)
            except ApiError as error:
                return error.status == 404
            return False

        await eventually(absent, f"end of pod {name}", timeout=30)

    async def job(self, name: str = "j") -> Object:
        return await self.client.get(JOBS, self.namespace, name)

    async def until_job(self, condition: str, name: str = "j") -> Object:
        def accept(job: Object) -> bool:
            return any(c["type"] == condition and c["status"] == "True" for c in job["status"].get("conditions", []))

        return await eventually(lambda: self.job(name), condition, until=accept, timeout=30)

    async def job_pods(self, name: str = "j") -> list[Object]:
        pods, _ = await self.client.list(PODS, self.namespace, labels=f"batch.kubernetes.io/job-name={name}")
        return sorted(pods, key=lambda pod: str(pod["spec"]["hostname"]))

    async def running_gang(self, name: str = "j", ready: int = 2) -> list[Object]:
        await eventually(
            lambda: self.job(name), "gang", until=lambda job: job["status"].get("ready") == ready, timeout=30
        )
        return await self.job_pods(name)

    async def output(self, name: str = "p", container: str = "main", **options: Any) -> str:
        stream = self.node.stream(self.namespace, name, container, **options)
        return b"".join([chunk async for chunk in stream]).decode()

    async def events(self, reason: str) -> list[str]:
        events, _ = await self.client.list(EVENTS, self.namespace)
        return [event["message"] for event in events if event["reason"] == reason]

    async def process(self, name: str) -> int:
        """The process id of the pod's command."""

        async def running() -> dict[str, int]:
            return self.node.process_ids(self.namespace, name)

        return (await eventually(running, "process"))["main"]


def terminated(pod: Object, number: int = 0) -> Object:
    state: Object = pod["status"]["containerStatuses"][number]["state"]["terminated"]
    return state


def waiting(pod: Object) -> Object:
    for record in pod["status"].get("containerStatuses", []):
        state: Object = record["state"].get("waiting", {})
        return state
    return {}


def alive(pid: int) -> bool:
    """Whether a process exists and has not ended (a zombie has)."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture
async def client(cluster: Sandbox) -> AsyncIterator[Client]:
    async with await Client.from_kubeconfig(cluster.kubeconfig) as client:
        yield client


@pytest.fixture
async def lab(client: Client, namespace: str, tmp_path: Path) -> AsyncIterator[Lab]:
    binder = Binder(client)
    resources = {"cpu": "64", GPU: "4"}
    async with Node(client, f"node-{namespace}", tmp_path, resources, crash_backoff=0.2, retry=0.2) as node:
        binder.start()
        yield Lab(client, namespace, node)
        await binder.close()
    await client.delete(NODES, None, node.name)


async def test_a_pod_is_told_what_its_spec_says_and_nothing_of_the_host(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOST_SECRET", "x")
    data = base64.b64encode(b"secret").decode()
    await lab.client.create(SECRETS, lab.namespace, {"metadata": {"name": "s"}, "data": {"key": data}})
    fields = {"NAME": "metadata.name", "IP": "status.podIP", "NODE": "spec.nodeName", "UID_": "metadata.uid"}
    env = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()]
    env += [
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
        {"name": "MASTER", "value": "p.sub.$(NS).svc"},
    ]
    env.insert(0, {"name": "NS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}})
    script = "import os, json; print(json.dumps(dict(os.environ)))"
    container = {"command": ["python", "-c", script], "env": env}
    await lab.run(hostname="p", subdomain="sub", container=container)
    pod = await lab.end()
    assert pod["status"]["phase"] == "Succeeded"
    assert terminated(pod)["reason"] == "Completed"
    told = json.loads(await lab.output())
    assert set(told) <= {
        *fields,
        *("KEY", "NS", "MASTER", "PATH", "LANG", "HOME", "HOSTNAME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH"),
        *("LC_CTYPE", "PWD"),
    }
    assert told["NAME"] == "p"
    assert told["KEY"] == "secret"
    assert told["NODE"] == lab.node.name
    assert told["UID_"] == pod["metadata"]["uid"]
    assert told["IP"] == told["MASTER"] == pod["status"]["podIP"]
    assert told["IP"].startswith("127.")


async def test_volumes_are_folders_and_paths_lead_to_them(lab: Lab) -> None:
    await lab.client.create(CONFIGMAPS, lab.namespace, {"metadata": {"name": "c"}, "data": {"run.json": "{}"}})
    mounts = {"config": "/etc/finetune", "work": "/work", "shm": "/dev/shm"}
    volumes: list[Object] = [
        {"name": "config", "configMap": {"name": "c"}},
        {"name": "work", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    shared = [{"name": name, "mountPath": path} for name, path in mounts.items()]
    env = [{"name": "WORK", "value": "/work"}, {"name": "SHM", "value": "/dev/shm/x"}]
    script = 'echo main > "$WORK/main"; echo m > "$SHM"; cat "$1" "$WORK/init"; stat -c %a "$1"'
    init = {"name": "init", "image": "x", "command": ["cp", "/etc/finetune/run.json", "/work/init"]}
    container = {
        "command": ["sh", "-c", script, "sh"],
        "args": ["/etc/finetune/run.json"],
        "env": env,
        "volumeMounts": shared,
    }
    await lab.run(container=container, initContainers=[init | {"volumeMounts": shared}], volumes=volumes)
    pod = await lab.end()
    assert (await lab.output()).split() == ["{}{}444"]
    assert pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    folder = lab.node.directory / "pods" / pod["metadata"]["uid"]
    assert (folder / "volumes/work/main").read_text() == "main\n"
    memory = _memory_folders(pod)
    await lab.client.delete(PODS, lab.namespace, "p")
    await lab.gone()
    await eventually(lambda: _absent([folder, *memory]), "removal of the pod's folders")


def _memory_folders(pod: Object) -> list[Path]:
    return list(Path("/dev/shm").glob(f"finetune-*/{pod['metadata']['uid']}"))


async def _absent(paths: list[Path]) -> bool:
    return not any(path.exists() for path in paths)


async def test_a_projected_token_is_the_pods_own(lab: Lab) -> None:
    token = {"path": "token", "audience": "finetune.dev/progress/1", "expirationSeconds": 600}
    volume = {"name": "progress", "projected": {"sources": [{"serviceAccountToken": token}]}}
    container = {
        "command": ["cat", "/var/run/finetune/token"],
        "volumeMounts": [{"name": "progress", "mountPath": "/var/run/finetune"}],
    }
    await lab.run(container=container, volumes=[volume])
    pod = await lab.end()
    spec = {"token": await lab.output(), "audiences": [token["audience"]]}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    review = await lab.client.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body=body)
    assert review["status"]["authenticated"]
    assert review["status"]["user"]["extra"]["authentication.kubernetes.io/pod-uid"] == [pod["metadata"]["uid"]]


async def test_a_token_is_renewed_while_the_pod_runs(client: Client, namespace: str, tmp_path: Path) -> None:
    token = {"path": "token", "expirationSeconds": 600}
    volume = {"name": "v", "projected": {"sources": [{"serviceAccountToken": token}]}}
    script = 'first=$(cat "$T"); while test "$first" = "$(cat "$T")"; do sleep 0.1; done'
    container = {
        "command": ["sh", "-c", script],
        "env": [{"name": "T", "value": "/var/run/token"}],
        "volumeMounts": [{"name": "v", "mountPath": "/var/run"}],
    }
    async with Node(client, f"node-{namespace}", tmp_path, token_renewal=0.001) as node:
        lab = Lab(client, namespace, node)
        await lab.run(container=container, volumes=[volume], nodeName=node.name)
        assert (await lab.end())["status"]["phase"] == "Succeeded"
    await client.delete(NODES, None, node.name)


async def test_termination_message_and_exit_code(lab: Lab) -> None:
    env = [{"name": "LOG", "value": "/dev/termination-log"}]
    await lab.run('printf said > "$LOG"; echo out; echo err >&2; exit 42', container={"env": env})
    pod = await lab.end()
    assert pod["status"]["phase"] == "Failed"
    state = terminated(pod)
    assert (state["exitCode"], state["reason"], state["message"]) == (42, "Error", "said")
    assert await lab.output() == "out\nerr\n"
    assert await lab.output(tail_lines=1) == "err\n"


async def test_logs_are_followed_until_the_container_ends(lab: Lab) -> None:
    gate = lab.node.directory / "gate"
    await lab.run(f"echo one; until test -e {gate}; do sleep 0.05; done; echo two")
    await lab.until("running pod", lambda pod: pod["status"]["phase"] == "Running")
    await eventually(lab.output, "the first line")
    stream = lab.node.stream(lab.namespace, "p", "main", follow=True)
    assert [await anext(stream), await anext(stream)] == [b"", b"one\n"]
    gate.touch()
    assert [chunk async for chunk in stream] == [b"two\n"]


async def test_deletion_asks_the_first_process_and_kills_all_after_the_grace_period(lab: Lab) -> None:
    script = (
        "import os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        "print(child.pid, flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    await lab.run(container={"command": ["python", "-c", script]}, terminationGracePeriodSeconds=1)
    await lab.until("running pod", lambda pod: pod["status"]["phase"] == "Running")
    child = int(await eventually(lab.output, "the child's process id"))
    first = await lab.process("p")
    watched = asyncio.create_task(_last_state(lab))
    await asyncio.sleep(0)
    began = time.monotonic()
    await lab.client.delete(PODS, lab.namespace, "p")
    await eventually(lab.output, "SIGTERM", until=lambda text: "asked" in text)
    assert alive(child)
    await lab.gone()
    assert 0.9 < time.monotonic() - began < 10
    assert not alive(first)
    assert not alive(child)
    last = terminated(await watched)
    assert (last["exitCode"], last["signal"]) == (137, 9)


async def _last_state(lab: Lab) -> Object:
    """The pod as it was just before it went."""
    last: Object = {}
    async for change in lab.client.changes(PODS, lab.namespace):
        if change.object:
            last = change.object
        if change.type == "DELETED":
            break
    return last


async def test_a_forced_deletion_kills_at_once(lab: Lab) -> None:
    await lab.run("trap '' TERM; while true; do sleep 1; done")
    await lab.until("running pod", lambda pod: pod["status"]["phase"] == "Running")
    pid = await lab.process("p")
    await lab.client.delete(PODS, lab.namespace, "p", grace_seconds=0)
    await eventually(lambda: _dead(pid), "end of the process")


async def _dead(pid: int) -> bool:
    return not alive(pid)


async def test_memory_above_the_limit_is_out_of_memory(lab: Lab) -> None:
    if not lab.node.enforces_memory:
        pytest.skip("this machine lets us make no memory cgroup")
    container = {
        "command": ["python", "-c", "x = bytearray(200 * 2**20); print(len(x))"],
        "resources": {"limits": {"memory": "64Mi"}},
    }
    await lab.run(container=container)
    state = terminated(await lab.end())
    assert (state["exitCode"], state["reason"]) == (137, "OOMKilled")


@pytest.mark.parametrize(
    ("container", "reason", "words"),
    [
        ({"command": []}, "CreateContainerError", "no command"),
        (
            {"env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "k"}}}]},
            "CreateContainerConfigError",
            'secret "absent" not found',
        ),
    ],
)
async def test_a_container_that_cannot_be_made_says_why(lab: Lab, container: Object, reason: str, words: str) -> None:
    await lab.run("true", container=container)
    pod = await lab.until(reason, lambda pod: waiting(pod).get("reason") == reason)
    assert words in waiting(pod)["message"]
    assert pod["status"]["phase"] == "Pending"
    messages = await eventually(lambda: lab.events("Failed"), "an Event")
    assert any(words in message for message in messages)
    await lab.client.delete(PODS, lab.namespace, "p")
    await lab.gone()


async def test_a_pod_starts_when_its_configmap_comes(lab: Lab) -> None:
    volume = {"name": "v", "configMap": {"name": "late"}}
    mounts = [{"name": "v", "mountPath": "/v"}]
    await lab.run(container={"command": ["cat", "/v/k"], "volumeMounts": mounts}, volumes=[volume])
    messages = await eventually(lambda: lab.events("FailedMount"), "an Event")
    assert 'configmap "late" not found' in messages[0]
    await lab.client.create(CONFIGMAPS, lab.namespace, {"metadata": {"name": "late"}, "data": {"k": "there"}})
    assert (await lab.end())["status"]["phase"] == "Succeeded"
    assert await lab.output() == "there"


async def test_a_missing_program_and_a_host_path_fail_the_pod(lab: Lab) -> None:
    await lab.run(name="program", container={"command": ["no-such-program"]})
    state = terminated(await lab.end("program"))
    assert (state["exitCode"], state["reason"]) == (128, "StartError")
    assert "executable file not found" in state["message"]
    await lab.run("true", name="host", volumes=[{"name": "h", "hostPath": {"path": "/"}}])
    pod = await lab.end("host")
    assert pod["status"]["reason"] == "UnsupportedVolume"
    assert "hostPath" in (await lab.events("FailedMount"))[0]


async def test_restarts_with_back_off(lab: Lab) -> None:
    counter = lab.node.directory / "runs"
    await lab.run(f"echo x >> {counter}; test $(wc -l < {counter}) -ge 3", restartPolicy="OnFailure")
    pod = await lab.end()
    status = pod["status"]["containerStatuses"][0]
    assert (pod["status"]["phase"], status["restartCount"]) == ("Succeeded", 2)
    assert status["lastState"]["terminated"]["exitCode"] == 1
    assert len(await lab.events("BackOff")) == 2


async def test_the_active_deadline_of_a_pod(lab: Lab) -> None:
    await lab.run("sleep 1000", activeDeadlineSeconds=1, terminationGracePeriodSeconds=5)
    pod = await lab.end()
    assert pod["status"]["reason"] == "DeadlineExceeded"
    assert (terminated(pod)["exitCode"], terminated(pod)["signal"]) == (143, 15)


async def test_gpus_are_counted_numbered_and_waited_for(lab: Lab) -> None:
    gate = lab.node.directory / "gate"
    script = f"echo gpus=$CUDA_VISIBLE_DEVICES; until test -e {gate}; do sleep 0.05; done"
    resources = {"resources": {"limits": {GPU: "3"}}}
    await lab.run(script, "first", container=resources)
    await lab.until("running pod", lambda pod: pod["status"]["phase"] == "Running", "first")
    await lab.run(script, "second", container=resources)

    def unschedulable(pod: Object) -> bool:
        return any(c.get("reason") == "Unschedulable" for c in pod["status"].get("conditions", []))

    pod = await lab.until("unschedulable pod", unschedulable, "second")
    assert "Insufficient nvidia.com/gpu" in pod["status"]["conditions"][0]["message"]
    gate.touch()
    for name in ("first", "second"):
        await lab.end(name)
        assert await lab.output(name) == "gpus=0,1,2\n"


async def test_a_gang_finds_its_first_pod_by_name(lab: Lab) -> None:
    script = (
        "import os, socket, time\n"
        "if os.environ['JOB_COMPLETION_INDEX'] == '0':\n"
        "    with socket.create_server((os.environ['IP'], 29500)) as server: print(server.accept()[0].recv(9))\n"
        "else:\n"
        "    while True:\n"
        "        try: socket.create_connection((os.environ['MASTER'], 29500)).sendall(b'hello'); break\n"
        "        except ConnectionRefusedError: time.sleep(0.05)\n"
    )
    env = [
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "MASTER", "value": f"j-0.j.{lab.namespace}.svc"},
    ]
    await lab.create_job("", container={"command": ["python", "-c", script], "env": env})
    job = await lab.until_job("Complete")
    assert job["status"]["completedIndexes"] == "0,1"
    first = (await lab.job_pods())[0]
    assert first["spec"]["hostname"] == "j-0"
    assert await lab.output(first["metadata"]["name"]) == "b'hello'\n"


async def test_one_failure_ends_the_gang_within_seconds(lab: Lab) -> None:
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [99]}},
    ]
    script = "exec python -c 'import time; time.sleep(1000)'"
    await lab.create_job(script, podFailurePolicy={"rules": rules})
    pods = await lab.running_gang()
    began = time.monotonic()
    os.kill(await lab.process(pods[0]["metadata"]["name"]), 9)
    job = await lab.until_job("Failed")
    assert time.monotonic() - began < 10
    assert [c["reason"] for c in job["status"]["conditions"]] == ["PodFailurePolicy", "PodFailurePolicy"]
    assert "exit code 137" in job["status"]["conditions"][0]["message"]
    left = [pod for pod in await lab.job_pods() if pod["status"]["phase"] == "Running"]
    assert left == []


async def test_a_preempted_pod_is_a_disruption(lab: Lab) -> None:
    await lab.create_job("exec sleep 1000", completions=1, parallelism=1)
    (pod,) = await lab.running_gang(ready=1)
    watched = asyncio.create_task(_last_state(lab))
    await asyncio.sleep(0)
    await lab.node.preempt(lab.namespace, pod["metadata"]["name"])
    await lab.until_job("Failed")
    last = await watched
    assert last["status"]["phase"] == "Failed"
    assert terminated(last)["exitCode"] == 143
    condition = next(c for c in last["status"]["conditions"] if c["type"] == "DisruptionTarget")
    assert (condition["status"], condition["reason"]) == ("True", "PreemptionByScheduler")


async def test_suspend_ends_the_processes_and_resume_starts_new_ones(lab: Lab) -> None:
    await lab.create_job("exec sleep 1000")
    pids = [await lab.process(pod["metadata"]["name"]) for pod in await lab.running_gang()]
    await lab.client.patch(JOBS, lab.namespace, "j", {"spec": {"suspend": True}})
    job = await lab.until_job("Suspended")
    await eventually(lab.job_pods, "no pods", until=lambda pods: not pods, timeout=30)
    assert not any(alive(pid) for pid in pids)
    assert not job["status"].get("failed")
    await lab.client.patch(JOBS, lab.namespace, "j", {"spec": {"suspend": False}})
    await lab.running_gang()


async def test_a_finished_job_is_removed_after_its_time(lab: Lab) -> None:
    await lab.create_job("true", ttlSecondsAfterFinished=1)

    async def absent() -> bool:
        jobs, _ = await lab.client.list(JOBS, lab.namespace)
        return not jobs and not await lab.job_pods()

    await eventually(absent, "removal of the Job and its pods", timeout=30)


async def test_a_restarted_node_reports_its_pods_as_lost(lab: Lab, client: Client, tmp_path: Path) -> None:
    await lab.run("exec sleep 1000")
    await lab.until("running pod", lambda pod: pod["status"]["phase"] == "Running")
    pid = await lab.process("p")
    await lab.node.close()
    assert not alive(pid)
    async with Node(client, lab.node.name, tmp_path, {"cpu": "64"}) as second:
        pod = await lab.end()
        assert pod["status"]["reason"] == "NodeLost"
        assert terminated(pod)["exitCode"] == 137
        await lab.run("true", "next")
        assert (await lab.end("next"))["status"]["phase"] == "Succeeded"
        assert second.name == lab.node.name


@pytest.mark.slow
async def test_200_pods_that_end_at_once(lab: Lab) -> None:
    await lab.create_job("true", completions=200, parallelism=200)
    job = await eventually(
        lab.job, "200 completions", until=lambda job: job["status"].get("succeeded") == 200, timeout=80, interval=0.5
    )
    assert job["status"]["completedIndexes"] == "0-199"
