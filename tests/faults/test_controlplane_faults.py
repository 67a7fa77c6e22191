"""The faults that a real control plane is asked to show: its API server dies, and comes back with what it knew."""

from pathlib import Path

import aiohttp
import pytest

from finetune_sandbox.controlplane import ControlPlane, assets_from_environment
from support.api import Api
from support.waiting import eventually

ASSETS = assets_from_environment()

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(120),
    pytest.mark.skipif(ASSETS is None, reason="needs the programs of $KUBEBUILDER_ASSETS"),
]


async def test_the_api_server_comes_back_with_what_it_knew(tmp_path: Path) -> None:
    assert ASSETS is not None
    path = "/api/v1/namespaces/default/configmaps"
    async with ControlPlane(ASSETS, tmp_path) as plane, Api.connect(plane.kubeconfig) as api:
        made = (await api.create(path, {"metadata": {"name": "kept"}})).must(201)
        await plane.kill_apiserver()
        with pytest.raises(aiohttp.ClientError):
            await api.get(f"{path}/kept")
        for _ in ("after a crash", "in order"):
            await plane.restart_apiserver()
            assert (await api.get(f"{path}/kept")).must(200) == made
        plane.check()
        # The controllers find it again, too.
        (await api.create("/api/v1/namespaces", {"metadata": {"name": "later"}})).must(201)
        account = "/api/v1/namespaces/later/serviceaccounts/default"
        await eventually(lambda: api.get(account), "ServiceAccount", until=lambda a: a.status == 200, timeout=60)
