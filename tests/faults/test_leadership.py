"""Two operators at once: one acts, and when it is killed the other goes on where it stopped."""

import asyncio
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support.api import Api
from support.operating import Operator, Proxy, Scene
from support.waiting import eventually
from support.world import RESULT

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


async def holder(api: Api, namespace: str) -> str:
    lease = await api.get(f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/ft")
    return str(lease.body["spec"].get("holderIdentity") or "") if lease.status == 200 else ""


async def test_the_second_takes_over_and_nothing_is_done_twice(
    cluster: "Sandbox", scene: Scene, api: Api, tmp_path: Path
) -> None:
    settings = {"LEASE": f"{scene.namespace}/ft", "LEASE_SECONDS": "3"}
    (tmp_path / "second").mkdir()
    async with Proxy.running(cluster.kubeconfig) as proxy:
        other = replace(scene, operator=Operator(tmp_path / "second", proxy, scene.namespace), proxy=proxy)
        await scene.operator.start(**settings, IDENTITY="a")
        await eventually(lambda: holder(api, scene.namespace), "a leader", until=lambda name: name == "a", timeout=30)
        await other.operator.start(**settings, IDENTITY="b")
        try:
            await scene.submit()
            await scene.reaches("Preparing")
            await scene.prepared()
            await scene.reaches("Starting")
            assert not work(proxy), "the one that stands by has written"
            assert scene.operator.process
            scene.operator.process.send_signal(signal.SIGKILL)
            await scene.operator.process.wait()
            await scene.completed("j-0")
            status = await scene.reaches("Complete")
            assert status["result"]["uri"] == RESULT.uri
            assert await holder(api, scene.namespace) == "b"
            assert await scene.jobs() == ["j-0", "j-prepare"]
            assert len([w for w in work(scene.proxy) if w.startswith("POST")]) == 5
            assert not [w for w in work(proxy) if w.startswith("POST")]
        finally:
            code = await other.operator.stop()
        assert code == 0
        # It gave the lease back: the next one need not wait.
        assert await holder(api, scene.namespace) == ""


async def test_an_operator_that_loses_the_lease_ends(scene: Scene, api: Api) -> None:
    await scene.operator.start(LEASE=f"{scene.namespace}/ft", LEASE_SECONDS="3", IDENTITY="a")
    await eventually(lambda: holder(api, scene.namespace), "a leader", until=lambda name: name == "a", timeout=30)
    path = f"/apis/coordination.k8s.io/v1/namespaces/{scene.namespace}/leases/ft"
    (await api.patch(path, {"spec": {"holderIdentity": "thief"}})).must(200)
    assert scene.operator.process
    assert await asyncio.wait_for(scene.operator.process.wait(), 20) == 1
    assert "the lease is held by thief" in scene.operator.log.read_text()
    assert await holder(api, scene.namespace) == "thief"


def work(proxy: Proxy) -> list[str]:
    """Its writes for jobs."""
    return [write for write in proxy.writes if "/leases" not in write]
