"""The metrics of a real operator: what they say while a job lives, and that its series go with it."""

import asyncio
import re
import socket
import sys

import aiohttp
import pytest

from finetune_operator.reconcile import utc_now
from support.operating import Scene
from support.waiting import eventually
from support.world import rfc3339

pytestmark = pytest.mark.integration
OF_JOB = {"job_name": "j"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Scraper:
    """One scrape, and sums over it."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    async def text(self) -> str:
        async with aiohttp.ClientSession() as session:
            try:
                async with session.get(self._url) as answer:
                    return await answer.text()
            except aiohttp.ClientConnectionError as error:
                raise AssertionError("nothing listens yet") from error

    async def value(self, name: str, **labels: str) -> float | None:
        """The sum over the series with these labels; None where there is none."""
        lines = [line for line in (await self.text()).splitlines() if re.match(rf"finetune_operator_{name}[{{ ]", line)]
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in wanted)]
        return sum(found) if found else None

    async def reaches(self, name: str, value: float | None, **labels: str) -> None:
        await eventually(
            lambda: self.value(name, **labels), f"{name} of {value}", until=lambda found: found == value, timeout=30
        )


async def test_what_is_told_of_a_job_from_its_manifest_to_its_end(scene: Scene) -> None:
    port = free_port()
    await scene.operator.start(METRICS_PORT=str(port))
    scraped, team = Scraper(port), scene.namespace
    await scraped.reaches("leader", 1)
    await scene.submit(distribution={"workers": 2})
    await scraped.reaches("jobs", 1, state="Preparing", reason="")
    await scene.prepared()
    await scene.run("j-0", 2)
    await scraped.reaches("namespace_jobs", 1, job_namespace=team, state="Running")
    await scraped.reaches("gpus", 2, job_namespace=team)
    assert await scraped.value("startup_seconds_count", phase="Preparing") == 1
    told = {"attempt": 0, "phase": "Training", "step": 3, "totalSteps": 10, "lastUpdatedTime": rfc3339(utc_now())}
    metrics = [{"name": "loss", "value": "1.25"}, {"name": "../../etc", "value": "1"}]
    status = {"trainerStatus": {**told, "metrics": metrics}}
    (await scene.api.patch(scene.job_path() + "/status", {"status": status}, "merge")).must(200)
    await scraped.reaches("job_loss", 1.25, **OF_JOB)
    assert await scraped.value("job_step", **OF_JOB) == 3
    assert "etc" not in await scraped.text()
    await scraped.reaches("startup_seconds_count", 1, phase="Loading")
    await scene.completed("j-0", 2)
    await scraped.reaches("jobs_ended_total", 1, job_namespace=team, state="Complete")
    assert await scraped.value("job_info", **OF_JOB) is None
    assert (await scraped.value("gpu_hours_total", job_namespace=team) or 0) > 0
    assert (await scraped.value("api_requests_total", verb="PATCH", resource="finetunejobs", code="200") or 0) > 0
    assert (await scraped.value("watch_events_total", kind="Pod") or 0) > 0
    assert await scraped.value("reconcile_errors_total", kind="ApiError") is None
    (await scene.api.delete(scene.job_path())).must(200)
    await scraped.reaches("namespace_jobs", None, job_namespace=team)


async def test_of_two_operators_only_the_one_that_acts_counts_jobs(scene: Scene) -> None:
    ports = free_port(), free_port()
    lease = f"{scene.namespace}/op"
    await scene.operator.start(METRICS_PORT=str(ports[0]), LEASE=lease, IDENTITY="first")
    leader, other = Scraper(ports[0]), Scraper(ports[1])
    await leader.reaches("leader", 1)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "finetune_operator"),
        env=scene.operator.environment(METRICS_PORT=str(ports[1]), LEASE=lease, IDENTITY="second"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await other.reaches("leader", 0)
        await scene.submit()
        await leader.reaches("jobs", 1)

        async def heard() -> bool:
            return bool(await other.value("watch_events_total", kind="FineTuneJob"))

        await eventually(heard, "watch events of the one that stands by", timeout=30)
        assert await other.value("jobs") == 0
    finally:
        process.terminate()
        await process.wait()
