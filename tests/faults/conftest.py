"""What the fault suite adds: its long form, what it counts, and the theatre that cases are played in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from support.tally import Tally, counts, families, line, write_report

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_sandbox.up import Sandbox
    from support.api import Api
    from support.playing import Theatre
    from support.warm_operator import Nursery


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether every case is to be tried (`make faults`), or a sample of them."""
    return bool(request.config.getoption("--whole") or request.config.getoption("--case"))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """For a test that tries many cases: how many of them were survived."""
    return Tally(request.node.user_properties)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    from support.warm_operator import nursery

    with nursery() as started:
        yield started


@pytest.fixture(scope="session")
def smooth_runs() -> dict[str, object]:
    """What was played without faults, for all tests."""
    return {}


@pytest.fixture
async def theatre(
    request: pytest.FixtureRequest,
    cluster: Sandbox,
    api: Api,
    nursery: Nursery,
    smooth_runs: dict[str, object],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Theatre:
    from support.playing import Theatre

    # One authority for all: pods are told of it, and what they are told is compared.
    tls = tmp_path_factory.getbasetemp() / "tls"
    only = request.config.getoption("--case") or ""
    theatre = Theatre(cluster.kubeconfig, api, nursery, tmp_path, tls, smooth_runs=smooth_runs, only=only)  # type: ignore[arg-type]
    await theatre.set_up()
    return theatre


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = counts(terminalreporter.stats)
    for family in families(found).values():
        terminalreporter.write_line(line(family))
    if config.getoption("--write-report") and found:
        server = "kube-apiserver" if os.environ.get("KUBEBUILDER_ASSETS") else "the sandbox's API server"
        write_report(config.rootpath / "benchmarks", found, server)
