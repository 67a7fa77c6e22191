"""Manifests in, checked artifacts out: many jobs of one laptop, some at a time."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from finetune_cli import artifact, follow, jobview, laptop
from finetune_cli import cluster as clusters
from finetune_cli.cluster import JOBS, Cluster, Target
from finetune_cli.errors import CliError
from finetune_cli.objectstore import Location, Store
from finetune_sandbox.client import ApiError
from finetune_sandbox.up import SandboxInfo
from support import judging, matrix, teaching
from support.laptop import started
from support.matrix import Cell, Spec

TRAINED, MINUTES = 120, 5.0


class Ended(NamedTuple):
    """How a job ended; `problem` is empty where everything is as it should be."""

    problem: str
    uri: str
    metrics: dict[str, float]
    seconds: float


@dataclass
class Runner:
    """`at_once`: jobs that run at a time."""

    directory: Path
    info: SandboxInfo
    store: Store
    at_once: int
    published: dict[str, Ended] = field(default_factory=dict)

    def put(self, path: Path, uri: str) -> None:
        self.store.upload(path, Location.parse(uri))

    def run(self, manifests: Sequence[Spec], done: Any = lambda name, ended: None) -> dict[str, Ended]:
        """By name; `done` hears of each as it ends."""

        async def all_of(cluster: Cluster) -> None:
            gate, telling = asyncio.Semaphore(self.at_once), asyncio.Lock()

            async def one(manifest: Spec) -> None:
                async with gate:
                    ended = await self._run(cluster, manifest)
                self.published[manifest["metadata"]["name"]] = ended
                # In a thread: while it works, watches and answers go on.
                async with telling:
                    await asyncio.to_thread(done, manifest["metadata"]["name"], ended)

            async with asyncio.TaskGroup() as group:
                for manifest in manifests:
                    group.create_task(one(manifest))

        clusters.run(Target(self.info.kubeconfig), all_of)
        return {manifest["metadata"]["name"]: self.published[manifest["metadata"]["name"]] for manifest in manifests}

    def reward_model(self) -> str:
        """The URI of one that was trained before, or is now."""
        name = matrix.JUDGE.name
        if name not in self.published:
            self.run([matrix.JUDGE.manifest()])
        return self.published[name].uri

    async def _run(self, cluster: Cluster, manifest: Spec) -> Ended:
        name, start = manifest["metadata"]["name"], time.monotonic()
        try:
            await cluster.apply(JOBS, manifest)
            ended = lambda job: jobview.outcome(job) is not None  # noqa: E731
            async with asyncio.timeout(60 * MINUTES):
                job = await follow.until(cluster, name, ended, lambda _: None)
        except (TimeoutError, CliError, ApiError, aiohttp.ClientError) as error:
            return Ended(f"{type(error).__name__} {error}", "", {}, time.monotonic() - start)
        seconds, status = time.monotonic() - start, job["status"]
        if status["state"] != "Complete":
            return Ended(status.get("message") or status["state"], "", {}, seconds)
        result = status["result"]
        return Ended("", result["uri"], result.get("metrics") or {}, seconds)

    def fetch(self, ended: Ended, directory: Path) -> Path:
        """What was published, each byte verified. Raises CliError."""
        artifact.fetch(self.store, Location.parse(ended.uri), directory)
        return directory

    def check(self, cell: Cell, ended: Ended) -> str:
        """What is wrong with a cell's result; empty: its figure moved, and what it published does what it learned."""
        if ended.problem:
            return ended.problem
        figure, metrics = cell.lesson.figure, ended.metrics
        stage, _, base = figure.rpartition("/")
        before, after = (metrics.get(f"{stage}/{name}" if stage else name) for name in (f"{base}Before", base))
        if before is None or after is None:
            return f"status.result.metrics lacks {figure} or its Before: {', '.join(sorted(metrics))}"
        moved = after - before if cell.lesson.rises else before - after
        if not moved >= cell.lesson.least:
            return f"{figure} went from {before:.4f} to {after:.4f}"
        folder = Path(tempfile.mkdtemp(dir=self.directory))
        try:
            published = self.fetch(ended, folder / "artifact")
            judging.assert_learned(published, self.directory / "base", cell.lesson.prefers)
            if cell.merged and (published / "merged").exists():
                judging.assert_learned(published / "merged", self.directory / "base", cell.lesson.prefers)
        except (AssertionError, CliError, OSError, ValueError, RuntimeError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder)
        return ""


@contextmanager
def running(directory: Path, at_once: int = 2) -> Iterator[Runner]:
    """A laptop with the matrix's model and data in it."""
    directory.mkdir(parents=True, exist_ok=True)
    # Little CPU: several gangs at a time on few cores.
    with started(directory, cpu="100m") as info:
        runner = Runner(directory, info, laptop.store(info), at_once)
        for path in teaching.make_model(directory / "base").iterdir():
            runner.put(path, f"{matrix.BUCKET}/models/matrix/{path.name}")
        for name, dataset in matrix.SETS.items():
            rows = teaching.write_rows(directory / f"{name}.jsonl", dataset, TRAINED, unpaired=name == "judged")
            runner.put(rows, f"{matrix.BUCKET}/matrix/{name}.jsonl")
        yield runner
