"""Floods of objects that a tenant may create, and what an honest tenant sees of the operator meanwhile."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median

from support.api import Object, idle_pod
from support.confined import Confinement, chart_limit_mib, confined
from support.operating import Scene

MOST_MIB = 400
"""Peak of the operator's memory in any flood."""
PATIENCE = 60.0
"""Seconds until the first status of an honest job; a busy machine, not the operator, may need many of them."""
LABELS = {"app.kubernetes.io/managed-by": "finetune-operator", "finetune.dev/attempt": "0"}
AT_ONCE = 6

SHAPES: dict[str, Callable[[int], Object]] = {
    "one long text": lambda size: {"env": [{"name": "A", "value": "x" * size}]},
    "a text that is six times as long as JSON": lambda size: {"env": [{"name": "A", "value": "<" * size}]},
    # The API server stores six bytes of each, sends twenty, and Python needs hundreds.
    "many small items": lambda size: {"env": [{"name": "A", "value": ""}] * (size // 20)},
}
"""Parts of a container that make a Job large."""


def forged_job(name: str, of: str = "nobody", container: Object | None = None) -> Object:
    """A Job that is labelled as the operator's and never runs."""
    trainer = {"name": "trainer", "image": "example.com/image:1", **(container or {})}
    template = {"spec": {"restartPolicy": "Never", "containers": [trainer]}}
    labels = LABELS | {"finetune.dev/job-name": of}
    return {"metadata": {"name": name, "labels": labels}, "spec": {"suspend": True, "template": template}}


def forged_pod(name: str, of: str = "nobody") -> Object:
    """A pod that is labelled as the operator's and is on no node."""
    pod = idle_pod(name)
    pod["metadata"]["labels"] = LABELS | {"finetune.dev/job-name": of}
    return pod


async def create_all(scene: Scene, path: str, manifests: Iterable[Object]) -> None:
    """Creates them, some at a time."""
    waiting = iter(manifests)

    async def creator() -> None:
        for manifest in waiting:
            (await scene.api.create(path, manifest)).must(201)

    await asyncio.gather(*(creator() for _ in range(AT_ONCE)))


@dataclass
class Flooded:
    """An operator under the chart's memory limit."""

    scene: Scene
    place: Confinement
    numbers: Iterator[int]
    waits: list[float] = field(default_factory=list)
    """Seconds from each honest create to the job's first status."""

    async def honest(self, count: int = 1) -> None:
        """Creates jobs one after the other; each gets a status in time. They are suspended: no pod of them matters."""
        for _ in range(count):
            name = f"honest-{next(self.numbers)}"
            await self.scene.submit(name, runPolicy={"suspend": True})
            began = time.monotonic()
            await self.scene.reaches("Suspended", name, timeout=PATIENCE)
            self.waits.append(time.monotonic() - began)

    async def during(self, churn: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Goes on with the flood and with honest creates for so long."""
        over = time.monotonic() + seconds

        async def flood() -> None:
            while time.monotonic() < over:
                await churn()

        flooding = asyncio.create_task(flood())
        while not flooding.done():
            await self.honest()
        await flooding

    def verify(self) -> str:
        """The operator lives and has stayed within its bounds. A line for people."""
        process = self.scene.operator.process
        assert process
        assert not self.place.oom_killed(), "the operator was killed for its memory"
        assert process.returncode is None, self.scene.operator.log.read_text(errors="replace")[-2000:]
        peak = self.place.peak_mib(process.pid)
        assert peak < MOST_MIB, f"the operator used {peak:.0f} MiB"
        waits = sorted(self.waits)
        spread = f"median {median(waits):.2f} s, longest {waits[-1]:.2f} s"
        return f"peak {peak:.0f} MiB, first status of {len(waits)} jobs: {spread}"


@asynccontextmanager
async def flooded(scene: Scene, first: int = 0) -> AsyncIterator[Flooded]:
    """Starts the operator in a cgroup of the chart's limit, and verifies at the end. Honest jobs are numbered from
    `first` on."""
    with confined(chart_limit_mib(), "flood") as place:
        scene.operator.confinement = place
        await scene.operator.start(RESYNC_SECONDS="5")
        try:
            state = Flooded(scene, place, itertools.count(first))
            yield state
            print(state.verify())
        finally:
            await scene.operator.stop()


def touching(scene: Scene, path: str, names: Iterable[str]) -> Callable[[], Awaitable[None]]:
    """A churn that annotates one object after the other: each is sent anew, whole, to whoever watches."""
    turn = itertools.cycle(names)
    numbers = itertools.count()

    async def touch() -> None:
        notes = {"metadata": {"annotations": {"test/touched": str(next(numbers))}}}
        (await scene.api.patch(f"{path}/{next(turn)}", notes)).must(200)

    return touch
