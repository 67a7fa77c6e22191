"""How fast the operator turns FineTuneJobs into running Jobs, beside a bare loop that writes the same objects.

    python benchmarks/operator/bench.py --jobs 200 2000 --idle 10000

Each measurement has an API server of its own (a real one where $KUBEBUILDER_ASSETS names one) without controllers, and
a "kubelet" that completes the prepare Jobs (parts.py). Results go to results.json and results.md beside this file.
"""

import argparse
import asyncio
import contextlib
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import report
from parts import NAMESPACE, PROFILE, job_manifest, kube_cluster, stamp
from processes import Child, Operator, child, fetch, free_port

from finetune_api.crd import crds
from finetune_operator.cluster import ApiError, KubeCluster
from finetune_sandbox.client import Client

Object = dict[str, Any]
PARTS = Path(__file__).with_name("parts.py")
CREATORS = 16
"""Jobs that are created at a time."""
DEADLINE = 900.0
QUIET = 2.0
"""After the last Job: its status and its Events are still to come."""
OURS = ("configmaps", "services", "jobs", "finetunejobs/status")


@dataclass
class Seen:
    """What the kubelet saw, and when."""

    gang: dict[str, float] = field(default_factory=dict)
    prepared: dict[str, float] = field(default_factory=dict)

    async def listen(self, kubelet: Child) -> None:
        while True:
            said = await kubelet.line()
            if said["seen"] == "error":
                raise RuntimeError(f"the kubelet failed: {said['job']}")
            table = {"gang": self.gang, "prepared": self.prepared}.get(said["seen"])
            if table is not None:
                table.setdefault(said["job"], said["at"])


@dataclass
class Bench:
    """An API server with the CRDs, a profile and a kubelet."""

    folder: Path
    kubeconfig: Path
    server: str
    cluster: KubeCluster
    seen: Seen
    listening: asyncio.Task[None]

    async def create(self, names: list[str], created: Callable[[str, str], None]) -> dict[str, float]:
        """Creates the jobs; when each creation began."""
        began: dict[str, float] = {}
        waiting = iter(names)

        async def creator() -> None:
            for name in waiting:
                began[name] = time.monotonic()
                made = await self.cluster.create(job_manifest(name))
                created(name, made["metadata"]["uid"])

        async with asyncio.TaskGroup() as group:
            for _ in range(CREATORS):
                group.create_task(creator())
        return began

    async def settled(self, names: list[str]) -> float:
        """When the last of the jobs had its gang, and its prepare Job was through."""
        await self.wait_for(
            f"children of {len(names)} jobs",
            lambda: len(self.seen.gang) >= len(names) <= len(self.seen.prepared),
        )
        return max(*(self.seen.gang[name] for name in names), *(self.seen.prepared[name] for name in names))

    async def wait_for(self, what: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not done():
            if self.listening.done():
                self.listening.result()
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} in {DEADLINE:.0f} s; {len(self.seen.gang)} have them")
            await asyncio.sleep(0.02)

    def writes(self) -> dict[str, int] | None:
        """Successful writes by resource since the server's start; None where the server does not count them."""
        text = fetch(self.kubeconfig, "/metrics")
        if "apiserver_request_total{" not in text:
            return None
        counts: dict[str, int] = {}
        for line in text.splitlines():
            if not line.startswith("apiserver_request_total{"):
                continue
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            if labels["verb"] in ("POST", "PATCH", "PUT", "DELETE", "APPLY") and labels["code"].startswith("2"):
                name = "/".join(part for part in (labels["resource"], labels["subresource"]) if part)
                counts[name] = counts.get(name, 0) + int(float(line.rsplit(" ", 1)[1]))
        return counts


@asynccontextmanager
async def bench(folder: Path) -> AsyncIterator[Bench]:
    """`folder` exists, and is this measurement's own."""
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            child(folder / "server.log", str(PARTS), "serve", str(folder / "server"))
        )
        ready = await server.line()
        kubeconfig = Path(ready["kubeconfig"])
        await install(kubeconfig)
        cluster = await stack.enter_async_context(kube_cluster(kubeconfig))
        kubelet = await stack.enter_async_context(child(folder / "kubelet.log", str(PARTS), "kubelet", str(kubeconfig)))
        await kubelet.line()
        seen = Seen()
        listening = asyncio.create_task(seen.listen(kubelet))
        stack.callback(listening.cancel)
        yield Bench(folder, kubeconfig, ready["server"], cluster, seen, listening)


async def install(kubeconfig: Path) -> None:
    """The CRDs and the profile."""
    async with await Client.from_kubeconfig(kubeconfig) as client:
        for crd in crds():
            await client.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body=crd)
        profiles = "/apis/finetune.dev/v1alpha1/finetuneprofiles"
        await retry(lambda: client.request("POST", profiles, body=PROFILE))
        await retry(lambda: client.request("GET", "/apis/finetune.dev/v1alpha1/finetunejobs"))


async def retry(call: Callable[[], Awaitable[object]]) -> None:
    """A CRD is served a moment after it was created."""
    for _ in range(200):
        with contextlib.suppress(Exception):
            await call()
            return
        await asyncio.sleep(0.1)
    await call()


@asynccontextmanager
async def operator(bench: Bench, workers: int) -> AsyncIterator[Operator]:
    port = free_port()
    env = {
        "KUBECONFIG": str(bench.kubeconfig),
        "FINETUNE_OPERATOR_WORKERS": str(workers),
        "FINETUNE_OPERATOR_METRICS_PORT": str(port),
        "FINETUNE_OPERATOR_TLS_FOLDER": str(bench.folder / "tls"),
    }
    async with child(bench.folder / "operator.log", "-m", "finetune_operator", env=env, end=signal.SIGTERM) as started:
        yield Operator(started, port)


async def canary(bench: Bench, created: Callable[[str, str], None]) -> None:
    """One job first: connections are open and watches established when the clock starts."""
    await bench.create(["canary"], created)
    await bench.settled(["canary"])
    await asyncio.sleep(QUIET)
    bench.seen.gang.clear()
    bench.seen.prepared.clear()


async def measure(
    bench: Bench, jobs: int, process: Child, created: Callable[[str, str], None], reads: Callable[[], float]
) -> report.Run:
    """`reads`: how many requests the process made so far that write nothing."""
    await canary(bench, created)
    names = [f"job-{number:05d}" for number in range(jobs)]
    before, cpu, read = bench.writes(), process.cpu_seconds(), reads()
    start = time.monotonic()
    began = await bench.create(names, created)
    end = await bench.settled(names)
    cpu = process.cpu_seconds() - cpu
    latency = sorted(bench.seen.gang[name] - began[name] for name in names)
    await asyncio.sleep(QUIET)
    after = bench.writes()
    writes = events = None
    if before is not None and after is not None:
        done = {key: count - before.get(key, 0) for key, count in after.items()}
        writes, events = sum(done.get(key, 0) for key in OURS) / jobs, done.get("events", 0) / jobs
    return report.Run(
        jobs=jobs,
        jobs_per_second=jobs / (end - start),
        created_per_second=jobs / (max(began.values()) - start),
        latency_p50=statistics.median(latency),
        latency_p99=latency[max(0, int(len(latency) * 0.99) - 1)],
        cpu_ms_per_job=1000 * cpu / jobs,
        resident_mb=process.resident_mb(),
        writes_per_job=writes,
        events_per_job=events,
        reads_per_job=(reads() - read) / jobs,
    )


async def run_bare(folder: Path, jobs: int, workers: int) -> report.Run:
    async with (
        bench(folder) as ready,
        child(folder / "bare.log", str(PARTS), "bare", str(ready.kubeconfig), str(workers)) as loop,
    ):
        await loop.line()
        return await measure(ready, jobs, loop, lambda name, uid: loop.tell(name=name, uid=uid), lambda: 0.0)


async def run_operator(folder: Path, jobs: int, workers: int) -> tuple[report.Run, report.Restart, str]:
    async with bench(folder) as ready:
        async with operator(ready, workers) as running:
            result = await measure(ready, jobs, running.child, lambda name, uid: None, running.reads)
        return result, await restart(ready, jobs + 1, workers, "running"), ready.server


async def restart(bench: Bench, jobs: int, workers: int, state: str) -> report.Restart:
    """Starts an operator before jobs that need nothing of it."""
    before = bench.writes()
    async with operator(bench, workers) as running:
        await bench.wait_for(f"look at {jobs} jobs", lambda: running.looked_at() >= jobs)
        seconds = time.monotonic() - running.began
        resident, cpu = running.child.resident_mb(), running.child.cpu_seconds()
        after = bench.writes()
    writes = None
    if before is not None and after is not None:
        writes = sum(after.get(key, 0) - before.get(key, 0) for key in (*OURS, "events"))
    return report.Restart(jobs, state, seconds, cpu, resident, writes)


async def run_idle(folder: Path, jobs: int, workers: int) -> report.Restart:
    """Finished jobs, as they pile up in a cluster."""
    async with bench(folder) as ready:
        condition = {"type": "Complete", "status": "True", "reason": "Complete", "lastTransitionTime": stamp()}
        status = {"state": "Complete", "conditions": [condition], "completionTime": stamp()}
        names = [f"job-{number:05d}" for number in range(jobs)]
        finishing: list[asyncio.Task[None]] = []
        slots = asyncio.Semaphore(CREATORS)

        async def finish(name: str, uid: str) -> None:
            async with slots:
                assert await ready.cluster.patch_status(NAMESPACE, name, uid, status)

        await ready.create(names, lambda name, uid: finishing.append(asyncio.create_task(finish(name, uid))))
        await asyncio.gather(*finishing)
        return await restart(ready, jobs, workers, "finished")


def machine() -> Object:
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model[1] if model else platform.machine(),
        "memoryGiB": round(int(memory[1]) / 2**20) if memory else None,
        "python": platform.python_version(),
    }


async def run(args: argparse.Namespace) -> Object:
    results: Object = {"machine": machine(), "workers": args.workers, "runs": [], "restarts": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:

        def fresh(name: str) -> Path:
            folder = Path(temporary, name)
            folder.mkdir()
            return folder

        for jobs in args.jobs:
            repeats = args.repeats if jobs <= 500 else 1
            bares, operators = [], []
            for repeat in range(repeats):
                print(f"{jobs} jobs, {repeat + 1} of {repeats}", file=sys.stderr)
                # One after the other in pairs: what else the machine does hits both.
                bares.append(await run_bare(fresh(f"bare-{jobs}-{repeat}"), jobs, args.workers))
                run, after, results["server"] = await run_operator(
                    fresh(f"operator-{jobs}-{repeat}"), jobs, args.workers
                )
                operators.append(run)
            pairs = zip(operators, bares, strict=True)
            ratio = statistics.median(own.jobs_per_second / bare.jobs_per_second for own, bare in pairs)
            results["runs"].append(
                {
                    "jobs": jobs,
                    "repeats": repeats,
                    "ratio": ratio,
                    "operator": asdict(report.median(operators)),
                    "bare": asdict(report.median(bares)),
                }
            )
            results["restarts"].append(asdict(after))
        if args.idle:
            print(f"{args.idle} finished jobs", file=sys.stderr)
            results["restarts"].append(asdict(await run_idle(fresh("idle"), args.idle, args.workers)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[200, 2000], help="jobs created at once, in each run")
    parser.add_argument("--idle", type=int, default=10_000, help="finished jobs that an operator starts with; 0: none")
    parser.add_argument("--repeats", type=int, default=3, help="of runs with at most 500 jobs; their median counts")
    parser.add_argument("--workers", type=int, default=16, help="jobs that are worked on at a time")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for results.json and .md")
    args = parser.parse_args()
    try:
        results = asyncio.run(run(args))
    except (RuntimeError, ApiError) as error:
        sys.exit(f"bench: {error}")
    results["command"] = (
        f"python benchmarks/operator/bench.py --jobs {' '.join(map(str, args.jobs))} --idle {args.idle}"
        f" --repeats {args.repeats} --workers {args.workers}"
    )
    report.write(args.output, results)
    print((args.output / "results.md").read_text())


if __name__ == "__main__":
    main()
