"""Strangers flood the operator's ports, from processes of their own: it lives, honest callers are answered, and its
memory stays far below the chart's limit. Each flood takes some seconds, and two minutes with `--whole`."""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

from finetune_api.failures import TerminationMessage
from support.admitting import PATH, paths_file, registered, webhooks
from support.api import Api, Object
from support.confined import Confinement, chart_limit_mib, confined, resident_peak_mib
from support.flooding import command
from support.manifests import job_manifest
from support.operating import GROUP, Scene
from support.reporting import Post, Reporting
from support.s3 import unused_port
from support.tally import Tally
from support.waiting import eventually
from support.world import PREPARED

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
SECONDS, WHOLE_SECONDS = 4.0, 120.0
P99_SECONDS = 1.0
PATIENCE_SECONDS = 8.0
"""In the short form, of few calls on a machine that may be busy: nobody waits longer, and half of them much less."""
MAX_MIB = 400.0
STRANGER = "127.0.0.2"
"""An address that is not the honest callers', as a pod has one of its own; 127.0.0.1 is everybody's."""


class Case(NamedTuple):
    """A flood of one port: `peers` of a kind of `support.flooding`."""

    name: str
    kind: str
    peers: int
    options: Object = {}


WEBHOOK = (
    Case("bodies of 7 MiB that do not end", "bodies", 40),
    Case("such bodies, by who knows the path", "bodies", 40, {"path": PATH}),
    Case("idle TLS connections", "idle-tls", 300),
    Case("idle TCP connections", "idle-tcp", 1100),
    Case("half a TLS handshake", "half-handshake", 1100),
    Case("handshakes that are broken off", "broken-handshakes", 40),
    Case("connections that are closed at once", "handshakes", 30),
    Case("heads byte by byte", "slow-head", 300),
    Case("bodies byte by byte, by who knows the path", "slow-body", 100, {"path": PATH}),
)
PROGRESS = (
    Case("idle TLS connections", "idle-tls", 1100),
    Case("reports of a pod without end", "posts", 60, {"source": STRANGER, "pause": 0.0}),
    Case("bodies of a pod byte by byte", "slow-body", 60, {"source": STRANGER}),
)
METRICS = (
    Case("readers who do not read", "slow-reader", 300),
    Case("idle TCP connections", "idle-tcp", 1100),
)

PROBES = METRICS[1:]


@dataclass
class Flooded:
    """An operator under its memory limit, and honest callers of all kinds."""

    scene: Scene
    confinement: Confinement | None
    ports: dict[str, int]
    reporter: tuple[str, str] = ("", "")
    """An honest pod's path and token."""
    took: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def pid(self) -> int:
        assert self.scene.operator.process
        return self.scene.operator.process.pid

    @property
    def folder(self) -> Path:
        return self.scene.operator.directory / "tls"

    async def create(self) -> None:
        """As a tenant: the API server asks the webhook."""
        job = job_manifest("honest", self.scene.namespace, profile=self.scene.profile)
        answer = await self.scene.api.create(self.scene.path("finetunejobs", api=GROUP), job, dryRun="All")
        assert answer.status == 201, answer.body

    async def probe(self) -> None:
        url = f"http://127.0.0.1:{self.ports['LIVENESS_PORT']}/healthz"
        async with aiohttp.request("GET", url) as answer:
            assert answer.status == 200, await answer.text()

    async def scrape(self) -> None:
        url = f"http://127.0.0.1:{self.ports['METRICS_PORT']}/metrics"
        async with aiohttp.request("GET", url) as answer:
            assert "finetune_operator_connections_total" in await answer.text()

    async def report(self) -> None:
        """As another job's pod."""
        answer = await Post(self.ports["PROGRESS_PORT"], self.folder / "ca.crt")(*self.reporter)
        assert answer.status == 200, answer.body

    async def call(self, honest: Callable[[], Awaitable[None]]) -> None:
        began = time.monotonic()
        try:
            await honest()
        except (AssertionError, OSError, aiohttp.ClientError, TimeoutError) as error:
            self.failed.append(repr(error)[:300])
        self.took.append(time.monotonic() - began)

    async def endure(self, case: Case, port: int, seconds: float, *honest: Callable[[], Awaitable[None]]) -> str:
        """Honest callers during the flood; what went wrong, or nothing."""
        self.took, self.failed = [], []
        flood = await asyncio.create_subprocess_exec(
            *command(case.kind, port, case.peers, seconds, **case.options), stdout=asyncio.subprocess.PIPE
        )
        end = time.monotonic() + seconds

        async def calls(one: Callable[[], Awaitable[None]]) -> None:
            while time.monotonic() < end:
                await self.call(one)
                # A job may report once a second.
                await asyncio.sleep(1.2 if one == self.report else 0.05)

        await asyncio.gather(*(calls(one) for one in honest))
        said, _ = await flood.communicate()
        assert self.scene.operator.process
        if self.scene.operator.process.returncode is not None:
            return f"it ended: {self.scene.operator.log.read_text()[-1000:]}"
        return self.verdict(case, json.loads(said or b"{}"), whole=seconds == WHOLE_SECONDS)

    def verdict(self, case: Case, flood: Object, *, whole: bool) -> str:
        took = sorted(self.took)
        p50, p99 = statistics.median(took), took[int(len(took) * 0.99)]
        peak = resident_peak_mib(self.pid)
        print(f"{case.name}: {flood}, {len(took)} calls p50 {p50:.3f} p99 {p99:.3f} s, peak {peak:.0f} MiB")
        assert flood.get("connections", 0) >= case.peers / 2, f"it was no flood: {flood}"
        if self.failed:
            return f"{len(self.failed)} of {len(took)} calls failed: {self.failed[0]}"
        if p99 > (P99_SECONDS if whole else PATIENCE_SECONDS) or p50 > P99_SECONDS:
            return f"{len(took)} calls: half within {p50:.2f} s, p99 {p99:.2f} s"
        if peak > MAX_MIB or (self.confinement and self.confinement.oom_killed()):
            return f"{peak:.0f} MiB at most"
        return ""


@pytest.fixture
async def flooded(scene: Scene, tmp_path: Path) -> AsyncIterator[Flooded]:
    with ExitStack() as stack:
        try:
            confinement = stack.enter_context(confined(chart_limit_mib(), "floods"))
        except pytest.skip.Exception:
            confinement = None  # Its memory is measured all the same.
        names = ("ADMISSION_PORT", "PROGRESS_PORT", "METRICS_PORT", "LIVENESS_PORT")
        ports = {name: unused_port() for name in names}
        made = Flooded(scene, confinement, ports)
        async with operating(made, tmp_path):
            yield made


@asynccontextmanager
async def operating(made: Flooded, directory: Path) -> AsyncIterator[None]:
    operator = made.scene.operator
    settings = {name: str(port) for name, port in made.ports.items()}
    environment = operator.environment(ADMISSION_PATHS=str(paths_file(made.folder)), **settings)
    program = (sys.executable, "-m", "finetune_operator")
    with operator.log.open("ab") as output:
        operator.process = await asyncio.create_subprocess_exec(
            *(made.confinement.command(*program) if made.confinement else program),
            env=environment,
            stdout=output,
            stderr=output,
        )

    async def ready() -> bool:
        try:
            await made.probe()
        except aiohttp.ClientError as error:
            raise AssertionError from error
        return True

    try:
        await eventually(ready, "an operator that is ready", timeout=60)
        url = f"https://127.0.0.1:{made.ports['ADMISSION_PORT']}{PATH}"
        manifests = webhooks(made.scene.namespace, url, (made.folder / "ca.crt").read_bytes())
        async with registered(made.scene.api, manifests):
            await eventually(lambda: asked(made), "an API server that asks the webhook", timeout=30)
            yield
    finally:
        # Its group is removed afterwards: nothing of it may run.
        await operator.stop()


async def asked(made: Flooded) -> bool:
    await made.create()
    url = f"http://127.0.0.1:{made.ports['METRICS_PORT']}/metrics"
    async with aiohttp.request("GET", url) as answer:
        return 'admission_reviews_total{result="allowed"}' in (text := await answer.text()) and (
            'admission_reviews_total{result="allowed"} 0.0' not in text
        )


@pytest.fixture
def seconds(whole: bool) -> float:
    """How long each flood takes."""
    return WHOLE_SECONDS if whole else SECONDS


async def test_the_webhook(flooded: Flooded, tally: Tally, seconds: float) -> None:
    port = flooded.ports["ADMISSION_PORT"]
    results = {case.name: await flooded.endure(case, port, seconds, flooded.create) for case in WEBHOOK}
    tally.count("floods", results)


async def test_metrics_and_probes(flooded: Flooded, tally: Tally, seconds: float) -> None:
    honest = (flooded.create, flooded.probe, flooded.scrape)
    results = {}
    for port, cases in (("METRICS_PORT", METRICS), ("LIVENESS_PORT", PROBES)):
        for case in cases:
            results[f"{port}: {case.name}"] = await flooded.endure(case, flooded.ports[port], seconds, *honest)
    tally.count("floods", results)


async def test_the_progress_server(flooded: Flooded, tally: Tally, seconds: float, api: Api) -> None:
    """One pod floods it by its own good token; another job's pod reports all the while."""
    scene, port = flooded.scene, flooded.ports["PROGRESS_PORT"]
    reports = {}
    for name in ("j", "k"):
        job = await scene.submit(name)
        await scene.reaches("Preparing", name)
        await scene.end(f"{name}-prepare", message=TerminationMessage(prepared=PREPARED))
        await scene.run(f"{name}-0")
        await scene.reaches("Running", name)
        (pod,) = await scene.pods(f"{name}-0")
        reporting = Reporting(api, scene.namespace, name, job["metadata"]["uid"])
        reports[name] = (reporting.path, await reporting.token(pod))
    flooded.reporter = reports["k"]
    hostile = {"path": reports["j"][0], "token": reports["j"][1]}
    results = {}
    for case in PROGRESS:
        whose = case._replace(options={**hostile, **case.options})
        results[case.name] = await flooded.endure(whose, port, seconds, flooded.create, flooded.report)
    tally.count("floods", results)
