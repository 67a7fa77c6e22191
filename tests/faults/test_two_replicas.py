"""Two operators at once, under load and with clocks that jump: each attempt has exactly one gang."""

import asyncio
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage
from finetune_operator.clock import utc_now
from support.api import Object
from support.faulty import FaultyProxy
from support.operating import Operator, Proxy, Scene
from support.playing import Theatre
from support.process import run as run_program
from support.scenarios import PATIENCE
from support.waiting import eventually
from support.warm_operator import WarmOperator
from support.world import PREPARED

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
LEASE_SECONDS = "3"
HOUR = 3600


def lease(scene_or_namespace: str) -> dict[str, str]:
    return {"LEASE": f"{scene_or_namespace}/ft", "LEASE_SECONDS": LEASE_SECONDS}


async def holder(scene: Scene) -> str:
    answer = await scene.api.get(scene.path("leases", "ft", "/apis/coordination.k8s.io/v1"))
    return str(answer.body["spec"].get("holderIdentity") or "") if answer.status == 200 else ""


def created_jobs(*proxies: Any) -> Counter[str]:
    """How often each Job was created, by whichever operator."""
    found: Counter[str] = Counter()
    for proxy in proxies:
        assert isinstance(proxy, FaultyProxy)
        for call, times in proxy.commits.items():
            if (call.verb, call.resource) == ("create", "jobs"):
                found[call.name] += times
    return found


async def life(scene: Scene, name: str, *, fails: bool, reached: Callable[[], None]) -> None:
    """A whole life of one job, its pods played by the test; the first attempt of some fails."""
    await scene.submit(name)
    await scene.reaches("Preparing", name, timeout=PATIENCE * 3)
    await scene.end(f"{name}-prepare", message=TerminationMessage(prepared=PREPARED))
    await scene.run(f"{name}-0")
    await scene.reaches("Running", name, timeout=PATIENCE * 3)
    reached()
    last = f"{name}-0"
    if fails:
        said = TerminationMessage(reason=Reason.HUNG, message="it hung")
        await scene.end(last, message=said, code=EXIT_CODES[Reason.HUNG])
        last = f"{name}-1"
    await scene.completed(last)
    await scene.reaches("Complete", name, timeout=PATIENCE * 3)


async def test_the_leader_is_killed_while_many_jobs_are_under_way(theatre: Theatre, whole: bool) -> None:
    """Some are being prepared then, some start, some run, some fail."""
    count = 100 if whole else 16
    running = 0
    half = asyncio.Event()

    def reached() -> None:
        nonlocal running
        running += 1
        if running >= count // 2:
            half.set()

    async with theatre.scene(IDENTITY="a") as scene:
        first = scene.operator
        assert isinstance(first, WarmOperator)
        await first.start(**lease(scene.namespace))
        await eventually(lambda: holder(scene), "a leader", until=lambda name: name == "a", timeout=PATIENCE)
        async with theatre.second(scene, IDENTITY="b") as second:
            await second.start(**lease(scene.namespace))
            async with asyncio.TaskGroup() as lives:
                for number in range(count):
                    lives.create_task(life(scene, f"job-{number}", fails=number % 3 == 0, reached=reached))
                await half.wait()
                await first.stop()
            assert await holder(scene) == "b"
            made = created_jobs(scene.proxy, second.proxy)
    expected = {f"job-{n}-{part}" for n in range(count) for part in ("prepare", "0", *(["1"] if n % 3 == 0 else []))}
    assert set(made) == expected
    assert {name: times for name, times in made.items() if times != 1} == {}


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long ahead(void) {
    char text[32] = {0};
    const char *path = getenv("CLOCK_AHEAD");
    int file = path ? open(path, O_RDONLY) : -1;
    if (file < 0) return 0;
    if (read(file, text, sizeof text - 1) < 0) text[0] = 0;
    close(file);
    return atol(text);
}
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, t);
    if (!result && id == CLOCK_REALTIME) t->tv_sec += ahead();
    return result;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""
"""A C library's clocks: CLOCK_REALTIME is as many seconds ahead as the file $CLOCK_AHEAD says, at each call."""


class Clock:
    """The wall clock of one process; its monotonic clock goes on as it did."""

    def __init__(self, library: Path, file: Path) -> None:
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(file)}
        self._file = file
        self.jump(0)

    def jump(self, seconds: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(str(seconds))
        os.replace(new, self._file)


@dataclass
class Skewed(Operator):
    """An operator with a wall clock of its own."""

    clock: Clock | None = None

    def environment(self, **settings: str) -> dict[str, str]:
        assert self.clock
        return super().environment(**settings) | self.clock.environment


@asynccontextmanager
async def skewed(cluster: "Sandbox", scene: Scene, library: Path, name: str) -> AsyncIterator[Skewed]:
    folder = scene.operator.directory / name
    folder.mkdir()
    async with Proxy.running(cluster.kubeconfig) as proxy:
        operator = Skewed(folder, proxy, scene.namespace, clock=Clock(library, folder / "ahead"))
        try:
            await operator.start(**lease(scene.namespace), IDENTITY=name)
            yield operator
        finally:
            if operator.process:
                await operator.stop()


@pytest.mark.skipif(shutil.which("cc") is None, reason="the clock of a process is set in C")
@pytest.mark.parametrize("hours", [-5, 5])
async def test_the_clock_of_one_of_them_jumps(cluster: "Sandbox", scene: Scene, tmp_path: Path, hours: int) -> None:
    """The lease stays where it is, no deadline is over, and whoever takes over goes on at once."""
    library = tmp_path / "clock.so"
    (tmp_path / "clock.c").write_text(SHIM)
    await run_program("cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "clock.c"), "-ldl")
    async with skewed(cluster, scene, library, "a") as first:
        await eventually(lambda: holder(scene), "a leader", until=lambda name: name == "a", timeout=PATIENCE)
        async with skewed(cluster, scene, library, "b") as second:
            assert first.clock
            assert second.clock
            await scene.submit(runPolicy={"activeDeadlineSeconds": HOUR})
            await scene.reaches("Preparing", timeout=PATIENCE)
            await scene.prepared()
            await scene.run("j-0")
            await scene.reaches("Running", timeout=PATIENCE)
            transitions = await changes(scene)
            # Both directions at both of them, while the job runs.
            for clock, ahead in (
                (first.clock, hours),
                (second.clock, -hours),
                (second.clock, 0),
                (second.clock, hours),
            ):
                clock.jump(ahead * HOUR)
                await renewed(scene, 3)
                assert (await holder(scene), await changes(scene)) == ("a", transitions)
            assert (await scene.status())["state"] == "Running"
            said = TerminationMessage(reason=Reason.HUNG, message="it hung")
            await scene.end("j-0", message=said, code=EXIT_CODES[Reason.HUNG])
            await eventually(scene.status, "the attempt's end", until=ended, timeout=PATIENCE)
            second.clock.jump(-hours * HOUR)
            assert first.process
            first.process.kill()
            await first.process.wait()
            await eventually(lambda: holder(scene), "another", until=lambda name: name == "b", timeout=PATIENCE)
            await scene.run("j-1")
            second.clock.jump(hours * HOUR)
            await scene.completed("j-1")
            status = await scene.reaches("Complete", timeout=PATIENCE)
    now = utc_now()
    for attempt in status["attempts"]:
        for key in ("creationTime", "startTime", "completionTime"):
            assert abs(datetime.fromisoformat(attempt[key]) - now) < timedelta(minutes=30), (key, attempt)
    assert [(a["number"], a["outcome"]) for a in status["attempts"]] == [(0, "Retryable"), (1, "Succeeded")]
    assert await scene.jobs() == ["j-0", "j-1", "j-prepare"]


def ended(status: Object) -> bool:
    return bool(status["attempts"][0].get("outcome"))


async def record(scene: Scene) -> Object:
    found: Object = (await scene.api.get(scene.path("leases", "ft", "/apis/coordination.k8s.io/v1"))).must(200)
    return found


async def changes(scene: Scene) -> int:
    """How often the lease has changed hands."""
    return int((await record(scene))["spec"]["leaseTransitions"])


async def renewed(scene: Scene, times: int) -> None:
    """The lease's record is written so many times more."""
    for _ in range(times):
        version = (await record(scene))["metadata"]["resourceVersion"]

        async def written(version: str = version) -> bool:
            return bool((await record(scene))["metadata"]["resourceVersion"] != version)

        await eventually(written, "a renewal", timeout=PATIENCE)
