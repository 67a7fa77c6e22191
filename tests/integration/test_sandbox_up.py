"""The whole sandbox: in the background, with S3, and its end."""

import asyncio
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from finetune_sandbox.client import NODES, PODS, ApiError, Client
from finetune_sandbox.s3 import S3
from finetune_sandbox.up import Sandbox, SandboxError, running, serve, start_background, stop_background
from support.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state"
    stop_background(tmp_path / "state")


def processes_below(folder: Path) -> list[str]:
    """Command lines and environments of this machine's processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if os.fsencode(folder) in words:
                found.append(entry.name)
    return found


def cpu_seconds(pid: int) -> float:
    """What a process has used so far: unlike the time on the clock, it does not depend on what else runs."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait_for(probe: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < deadline, "not within 20 s"
        time.sleep(0.05)


async def sleeper(client: Client, folder: Path) -> None:
    """A pod that runs for ever, with a child that left its session."""
    script = "setsid sleep 1000 & exec sleep 1000"
    container = {
        "name": "main",
        "image": "x",
        "command": ["sh", "-c", script],
        "env": [{"name": "MARK", "value": str(folder)}],
    }
    spec = {"restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container]}
    await client.create(PODS, "default", {"metadata": {"name": "p"}, "spec": spec})
    await eventually(
        lambda: client.get(PODS, "default", "p"),
        "running pod",
        until=lambda pod: pod["status"]["phase"] == "Running",
        timeout=20,
    )


async def test_up_and_down(folder: Path) -> None:
    info = start_background(folder)
    assert cpu_seconds(info.pid) < 3
    assert running(folder) == info == start_background(folder)
    for private in ("sandbox.json", "s3.credentials"):
        assert stat.S_IMODE((folder / private).stat().st_mode) == 0o600
    assert json.loads((folder / "sandbox.json").read_text())["pid"] == info.pid
    with pytest.raises(SandboxError, match="already"):
        serve(folder)
    info.s3().create_bucket("models")
    assert [bucket["Name"] for bucket in info.s3().client().list_buckets()["Buckets"]] == ["models"]
    async with await Client.from_kubeconfig(info.kubeconfig) as client:
        await sleeper(client, folder)
    assert stop_background(folder)
    assert running(folder) is None
    assert not stop_background(folder)
    wait_for(lambda: not processes_below(folder))


async def test_nothing_survives_a_sandbox_that_is_killed(folder: Path) -> None:
    info = start_background(folder)
    async with await Client.from_kubeconfig(info.kubeconfig) as client:
        await sleeper(client, folder)
    assert processes_below(folder)
    os.kill(info.pid, signal.SIGKILL)
    wait_for(lambda: not processes_below(folder))
    assert running(folder) is None
    again = start_background(folder)
    assert again.pid != info.pid


def test_a_sandbox_that_cannot_start_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(folder / "nothing"))
    with pytest.raises(SandboxError, match="did not start") as caught:
        start_background(folder)
    assert "has no executable" in str(caught.value)


async def test_logs_through_the_api_server(sandbox: Sandbox, tmp_path: Path) -> None:
    assert sandbox.node is not None
    script = f"echo one; echo two; until test -e {tmp_path}/gate; do sleep 0.05; done; echo three"
    good = {"name": "main", "image": "x", "command": ["sh", "-c", script]}
    spec = {"restartPolicy": "Never", "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0}
    waiting = {"name": "main", "image": "x"}
    async with await Client.from_kubeconfig(sandbox.kubeconfig) as client:
        for name, container in (("good", good), ("waiting", waiting)):
            pod = {"metadata": {"name": f"logs-{name}"}, "spec": spec | {"containers": [container]}}
            await client.create(PODS, "default", pod)

        async def log(name: str, **params: str) -> str:
            path = f"/api/v1/namespaces/default/pods/logs-{name}/log"
            try:
                return str((await client.request("GET", path, params=params)).get("message", ""))
            except ApiError as error:
                if error.status != 400:
                    raise
                return f"{error.reason}: {error.message}"

        await eventually(lambda: log("good"), "output", until=lambda text: text == "one\ntwo\n")
        assert await log("good", tailLines="1") == "two\n"
        follower = asyncio.create_task(log("good", follow="true"))
        (tmp_path / "gate").touch()
        assert await follower == "one\ntwo\nthree\n"
        refused = await eventually(lambda: log("waiting"), "refusal", until=lambda text: "waiting to start" in text)
        assert refused.startswith("BadRequest")
        for name in ("good", "waiting"):
            await client.delete(PODS, "default", f"logs-{name}")


async def test_a_node_can_serve_any_cluster(cluster: Sandbox, namespace: str, tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from finetune_sandbox.node import serve; "
    script += "serve(Path(sys.argv[1]), sys.argv[2], {'example.com/thing': '2'}, Path(sys.argv[3]), bind=True)"
    name = f"served-{namespace}"
    command = [sys.executable, "-c", script, str(cluster.kubeconfig), name, str(tmp_path)]
    server = await asyncio.create_subprocess_exec(*command)
    container = {"name": "main", "image": "x", "command": ["true"], "resources": {"limits": {"example.com/thing": "2"}}}
    spec = {"restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container]}
    async with await Client.from_kubeconfig(cluster.kubeconfig) as client:
        try:
            await client.create(PODS, namespace, {"metadata": {"name": "p"}, "spec": spec})
            pod = await eventually(
                lambda: client.get(PODS, namespace, "p"),
                "end of the pod",
                until=lambda pod: pod["status"]["phase"] == "Succeeded",
                timeout=30,
            )
            assert pod["spec"]["nodeName"] == name
            server.terminate()
            assert await server.wait() == 0
            node = await client.get(NODES, None, name)
            ready = next(c for c in node["status"]["conditions"] if c["type"] == "Ready")
            assert (ready["status"], ready["reason"]) == ("False", "KubeletNotReady")
        finally:
            if server.returncode is None:
                server.kill()
                await server.wait()
            await client.delete(NODES, None, name)


async def test_s3_lets_each_user_do_what_is_his(tmp_path: Path) -> None:
    server = await S3.start(tmp_path)
    try:
        server.create_bucket("data")
        writer = server.client(server.create_user("writer", ["data/a"]))
        reader = server.client(server.create_user("reader", ["data"], read_only=True))
        writer.put_object(Bucket="data", Key="a/x", Body=b"1", IfNoneMatch="*")
        assert reader.get_object(Bucket="data", Key="a/x")["Body"].read() == b"1"
        for refused in (
            lambda: writer.put_object(Bucket="data", Key="a/x", Body=b"2", IfNoneMatch="*"),
            lambda: writer.put_object(Bucket="data", Key="b/x", Body=b"2"),
            lambda: reader.put_object(Bucket="data", Key="a/x", Body=b"2"),
            lambda: reader.list_objects_v2(Bucket="other"),
        ):
            with pytest.raises(ClientError, match=r"PreconditionFailed|AccessDenied"):
                refused()
        assert reader.get_object(Bucket="data", Key="a/x")["Body"].read() == b"1"
    finally:
        await server.stop()
