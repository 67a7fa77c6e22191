"""What every suite may use: the shared API server, a fresh namespace, and a bare client."""

import secrets
from collections.abc import AsyncIterator, Iterator

import pytest

from support.api import Api
from support.clusters import Cluster, running_cluster
from support.waiting import eventually


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for the whole run (with xdist: for each worker): tests keep apart by their namespaces."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
async def api(cluster: Cluster) -> AsyncIterator[Api]:
    """A bare client with a cluster administrator's rights."""
    async with Api.connect(cluster.kubeconfig) as client:
        yield client


@pytest.fixture
async def namespace(api: Api) -> AsyncIterator[str]:
    """A fresh namespace in which pods can be created; its deletion is asked for, but not waited for."""
    name = f"test-{secrets.token_hex(4)}"
    (await api.create("/api/v1/namespaces", {"metadata": {"name": name}})).must(201)
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    await eventually(lambda: api.get(account), "default ServiceAccount", until=lambda answer: answer.status == 200)
    yield name
    await api.delete(f"/api/v1/namespaces/{name}")
