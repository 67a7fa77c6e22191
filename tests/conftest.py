"""What every suite may use: the shared clusters, a fresh namespace, and a bare client."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from support.api import Api
from support.clusters import running
from support.waiting import eventually

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox
    from support.operating import Scene


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="tests/faults: every case instead of a sample")
    parser.addoption("--write-report", action="store_true", help="tests/faults: write benchmarks/faults.md")
    parser.addoption("--case", help="tests/faults: only cases with this in their title, as a failure names them")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """An API server with its controllers, and no node: pods do what the test reports of them.

    One for the whole run (with xdist: for each worker); tests keep apart by their namespaces.
    """
    with running(tmp_path_factory.mktemp("cluster"), node=False, s3=False) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A whole cluster: its node runs pods as processes, and it has S3. Shared as `cluster` is."""
    with running(tmp_path_factory.mktemp("sandbox")) as sandbox:
        yield sandbox


@pytest.fixture
async def api(cluster: Sandbox) -> AsyncIterator[Api]:
    """A bare client of `cluster`, with an administrator's rights."""
    async with Api.connect(cluster.kubeconfig) as client:
        yield client


@pytest.fixture
async def namespace(api: Api) -> AsyncIterator[str]:
    """A fresh namespace of `cluster` in which pods can be created; its deletion is asked for, but not waited for."""
    name = f"test-{secrets.token_hex(4)}"
    (await api.create("/api/v1/namespaces", {"metadata": {"name": name}})).must(201)
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    await eventually(lambda: api.get(account), "default ServiceAccount", until=lambda answer: answer.status == 200)
    yield name
    await api.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture
async def scene(cluster: Sandbox, api: Api, namespace: str, tmp_path: Path) -> AsyncIterator[Scene]:
    """One namespace with a profile before `cluster`; no operator runs yet."""
    from support.operating import GROUP, Operator, Proxy, Scene  # here, so that the unit tests need not wait for them
    from support.reporting import install_crds
    from support.world import make_profile

    await install_crds(api)
    profile = make_profile(f"profile-{secrets.token_hex(4)}", default=False)
    del profile["metadata"]["resourceVersion"]
    (await api.create(f"{GROUP}/finetuneprofiles", profile)).must(201)
    async with Proxy.running(cluster.kubeconfig) as proxy:
        operator = Operator(tmp_path, proxy, namespace)
        yield Scene(api, namespace, profile["metadata"]["name"], operator, proxy)
        if operator.process:
            await operator.stop()
    await api.delete(f"{GROUP}/finetuneprofiles/{profile['metadata']['name']}")
