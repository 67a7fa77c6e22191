"""Jobs that want more nodes together than there are, under a scheduler that binds one pod after the other."""

import itertools

import pytest

from support.world import World, make_job, rfc3339

STEP, RUNS = 10, 200
"""Seconds of a look at everything; and of a gang's training."""


class Nodes:
    """`count` nodes, each for one pod."""

    def __init__(self, count: int, worlds: list[World]) -> None:
        self.count, self.worlds = count, worlds
        self.since: dict[int, float] = {}
        """When each world's gang began to run."""

    @staticmethod
    def gang(world: World) -> str | None:
        gangs = (name for name in world.names("Job") if name[-1].isdigit())
        return next((name for name in gangs if "status" not in world.objects["Job", name]), None)

    def tick(self, seconds: float) -> None:
        for world in self.worlds:
            for key in [key for key in world.objects if key[0] == "Pod"]:
                if key[1].rsplit("-", 2)[0] not in world.names("Job"):
                    del world.objects[key]
            if job := self.gang(world):
                for pod in world.pods(job):
                    if not pod["status"].get("conditions"):
                        pod["spec"].pop("nodeName", None)
                        pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False"}]
        self._bind()
        for number, world in enumerate(self.worlds):
            job = self.gang(world)
            if job and all("nodeName" in pod["spec"] for pod in world.pods(job)):
                if seconds - self.since.setdefault(number, seconds) >= RUNS:
                    world.complete(job)
                elif world.pod(job)["status"]["phase"] == "Pending":
                    world.run(job)

    def _bind(self) -> None:
        """One pod of each job in turn, as long as there is room."""
        pods = [[p for (k, _), p in world.objects.items() if k == "Pod"] for world in self.worlds]
        busy = sum(
            "nodeName" in p["spec"] and p["status"]["phase"] in ("Pending", "Running")
            for p in itertools.chain(*pods)
            if p["metadata"]["labels"]["finetune.dev/attempt"] != "prepare"
        )
        for pod in itertools.chain(*itertools.zip_longest(*pods)):
            if pod and busy < self.count and "nodeName" not in pod["spec"]:
                busy += 1
                pod["spec"]["nodeName"] = "some-node"
                bound = {"type": "PodScheduled", "status": "True", "lastTransitionTime": rfc3339(self.worlds[0].now)}
                pod["status"]["conditions"] = [bound]


@pytest.mark.parametrize(("nodes", "workers", "jobs", "seed"), [(4, 3, 2, 0), (4, 4, 2, 1), (5, 4, 3, 4)])
async def test_they_run_one_after_the_other(nodes: int, workers: int, jobs: int, seed: int) -> None:
    """Each holds what the other lacks; without giving it back neither would ever start."""
    spec = {"distribution": {"workers": workers}, "training": {"globalBatchSize": 12}}
    worlds = [World(make_job().with_meta(uid=f"uid-{seed}-{n}").with_spec(**spec).build()) for n in range(jobs)]
    for world in worlds:
        await world.settle()
        world.prepared()
        await world.settle()
    cluster = Nodes(nodes, worlds)
    for tick in range(7200 // STEP):
        cluster.tick(tick * STEP)
        for world in worlds:
            await world.settle()
            world.later(STEP)
        if all(world.state == "Complete" for world in worlds):
            break
    assert [world.state for world in worlds] == ["Complete"] * jobs
    returned = [attempt for world in worlds for attempt in world.status.attempts if attempt.outcome == "Preempted"]
    assert returned
    assert {attempt.reason for attempt in returned} == {"Unschedulable"}
