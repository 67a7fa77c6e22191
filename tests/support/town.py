"""Two tenants of one operator, in memory: what one of them breaks must not reach the other.

The operator's own controller works on it, without a network: its looks at everything, its watches' handlers, its queue.
"""

import copy
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import generate_latest

from finetune_api.failures import Reason
from finetune_api.progress import TrainerStatus
from finetune_operator.budgets import Budgets
from finetune_operator.cluster import ApiError
from finetune_operator.containment import Where, named
from finetune_operator.controller import Controller
from finetune_operator.manifests import JOB_LABEL
from finetune_operator.profiles import Profiles
from finetune_operator.reconcile import utc_now
from finetune_operator.settings import Settings
from support.poison import Stage
from support.world import CONTEXT, World, make_job, make_profile, merge, started

Object = dict[str, Any]
BUDGET = {"gpuHours": 1000.0, "period": "Month"}
GPU = {"memory": "80Gi", "tflops": 100}


def _profile(name: str) -> Object:
    return make_profile(
        name, default=False, budget=BUDGET, accelerator=GPU, concurrency={"gpus": 64}, networkPolicy=True
    )


def _world(namespace: str, profile: str, name: str) -> World:
    job = make_job(name).with_spec(profile=profile).with_meta(namespace=namespace, uid=f"{namespace}-{name}").build()
    return World(job, profiles=[_profile(profile)], now=utc_now())


async def _runs(world: World) -> None:
    await started(world)
    told = TrainerStatus.model_validate(
        {
            "attempt": 0,
            "phase": "Training",
            "step": 7,
            "totalSteps": 100,
            "estimatedRemainingSeconds": 60,
            "metrics": [{"name": "loss", "value": "1.5"}],
            "lastUpdatedTime": "2026-03-01T12:00:00Z",
        }
    )
    world.job["status"]["trainerStatus"] = told.to_json()


async def _fails(world: World) -> None:
    await started(world)
    world.fail(f"{world.job['metadata']['name']}-0", Reason.RANK_FAILED)


async def _completes(world: World) -> None:
    await started(world)
    world.complete(f"{world.job['metadata']['name']}-0")


async def _prepares(world: World) -> None:
    await world.settle()
    name = world.job["metadata"]["name"]
    world.run(f"{name}-prepare")
    world.prepared()


async def _waits(world: World) -> None:
    await started(world, attempt_runs=False)
    world.place(f"{world.job['metadata']['name']}-0", 0)


async def _is_new(world: World) -> None:
    """Nothing has happened to it."""


LIVES = {
    "new": _is_new,
    "prepared": _prepares,
    "waits": _waits,
    "runs": _runs,
    "fails": _fails,
    "completes": _completes,
}


def objects_of(world: World) -> dict[str, Sequence[Object]]:
    """As an API server would list them."""
    found: dict[str, list[Object]] = {"FineTuneJob": [world.job], "FineTuneProfile": world.profiles}
    for (kind, name), one in world.objects.items():
        meta = one["metadata"] | {"name": name, "namespace": world.job["metadata"]["namespace"]}
        found.setdefault(kind, []).append(one | {"metadata": meta})
    return copy.deepcopy(found)


async def stages() -> list[Stage]:
    """A job of team-a at each time of its life."""
    found = []
    for name, life in LIVES.items():
        world = _world("team-a", "shared", "bot")
        await life(world)
        found.append(Stage(name, objects_of(world)))
    return found


async def honest() -> Stage:
    world = _world("honest", "honest", "bot")
    await _runs(world)
    return Stage("honest", objects_of(world))


class Town:
    """Implements the operator's `Cluster`; what it is told to write must be JSON that an API server can read."""

    def __init__(self, *parts: Mapping[str, Sequence[Object]]) -> None:
        self.objects: dict[tuple[str, str, str], Object] = {}
        for part in parts:
            for kind, some in part.items():
                for number, one in enumerate(some):
                    self.objects[kind, *_key(one, number)] = one
        self.events: list[Object] = []
        self.settled: set[str] = set()
        self.writes = 0

    def _written(self, body: Object) -> None:
        _checked(body)
        self.writes += 1

    def _of(self, kind: str) -> list[Object]:
        return [one for (found, _, _), one in self.objects.items() if found == kind]

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return self.objects.get((kind, namespace or "", name))

    async def get_whole(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return await self.get(kind, namespace, name)

    async def list_children(self, kind: str, namespace: str, job: str) -> list[Object]:
        found = []
        for (of, where, _), one in self.objects.items():
            labels = one.get("metadata", {}).get("labels") if isinstance(one.get("metadata"), dict) else None
            if (of, where) == (kind, namespace) and isinstance(labels, dict) and labels.get(JOB_LABEL) == job:
                found.append(one)
        return found

    async def list_profiles(self) -> list[Object]:
        return self._of("FineTuneProfile")

    async def list_names(self, namespaces: tuple[str, ...]) -> set[tuple[str, str]]:
        return {named(one) for one in self._of("FineTuneJob")}

    async def list_all(self, kind: str, namespaces: tuple[str, ...]) -> AsyncIterator[Object]:
        for one in self._of(kind):
            yield one

    async def create(self, manifest: Object) -> Object:
        self._written(manifest)
        key = manifest["kind"], manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        if key in self.objects:
            raise ApiError(409, "AlreadyExists", key[2])
        meta = manifest["metadata"] | {"uid": f"made-{len(self.objects)}", "creationTimestamp": "2026-03-01T12:00:00Z"}
        self.objects[key] = manifest | {"metadata": meta}
        return self.objects[key]

    async def delete(self, kind: str, namespace: str, name: str, uid: str, resource_version: str | None = None) -> bool:
        self.writes += 1
        return self.objects.pop((kind, namespace, name), None) is not None

    async def patch_status(
        self, namespace: str, name: str, uid: str, patch: Object, resource_version: str | None = None
    ) -> Object | None:
        self._written(patch)
        found = self.objects.get(("FineTuneJob", namespace, name))
        if found is not None:
            found["status"] = merge(found.get("status"), patch)
        return found

    async def patch_profile_status(self, name: str, patch: Object) -> bool:
        self._written(patch)
        self.settled |= {f"{name}/{namespace}" for namespace in patch.get("usage", {})}
        return ("FineTuneProfile", "", name) in self.objects

    async def list_workloads(self, namespace: str, job_uid: str) -> list[Object] | None:
        return None

    async def post_event(self, event: Object) -> None:
        _checked(event)
        self.events.append(event)


def _key(one: Any, number: int) -> tuple[str, str]:
    """Where an API server would keep it, whatever its metadata say."""
    meta = one.get("metadata") if isinstance(one, dict) else None
    known = meta if isinstance(meta, dict) else {}
    namespace, name = known.get("namespace"), known.get("name")
    at = name if isinstance(name, str) and name else f"unnamed-{number}"
    return namespace if isinstance(namespace, str) else "", at


def _checked(body: Object) -> None:
    """An API server reads int64 and no NaN."""
    try:
        json.dumps(body, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise AssertionError("the operator wrote what is no JSON") from error
    if any(abs(number) >= 2**63 for number in _whole_numbers(body)):
        raise AssertionError("the operator wrote a number that is no int64")


def _whole_numbers(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in _whole_numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in _whole_numbers(inner)]
    return [value] if isinstance(value, int) else []


class Operator:
    """A controller on a town."""

    def __init__(self, town: Town, folder: Path) -> None:
        self.town = town
        self.controller = Controller(Settings(tls_folder=folder))
        self.errors: list[tuple[Where, str, str, Exception]] = []
        it, contained = self.controller, self.controller._contained
        it._cluster = town  # type: ignore[assignment]
        it._profiles, it._context = Profiles(town), CONTEXT  # type: ignore[arg-type]
        it._budgets = Budgets(town, contained)  # type: ignore[arg-type]
        it.metrics.jobs.accounts = lambda: it._budgets.accounts(utc_now())
        tell = contained.tell

        def noted(where: Where, namespace: str, name: str, error: Exception) -> bool:
            self.errors.append((where, namespace, name, error))
            return tell(where, namespace, name, error)

        contained.tell = noted  # type: ignore[method-assign]
        self.pause: float | None = None
        done = it._queue._schedule.done

        def noted_pause(*args: Any, **kwargs: Any) -> float | None:
            self.pause = done(*args, **kwargs)
            return self.pause

        it._queue._schedule.done = noted_pause  # type: ignore[method-assign]

    async def hear(self) -> None:
        """Every object, as watches tell of it: it is there, it changes, it goes."""
        it = self.controller
        handlers = {"FineTuneJob": it.on_job, "Job": it.on_child, "Pod": it.on_pod}
        for event in (None, "MODIFIED"):
            for (kind, _, _), one in list(self.town.objects.items()):
                if handler := handlers.get(kind):
                    handler(event, one)

    async def forget(self) -> None:
        for kind, handler in (("Pod", self.controller.on_pod), ("FineTuneJob", self.controller.on_job)):
            for (found, namespace, _), one in list(self.town.objects.items()):
                if found == kind and namespace != "honest":
                    handler("DELETED", one)

    async def look(self) -> None:
        """All of them, twice: the first look counts nothing."""
        for _ in range(2):
            await self.controller._resync()

    async def work(self, limit: int = 8) -> None:
        """What is on the queue, some times over."""
        queue = self.controller._queue
        for _ in range(limit):
            key = queue._schedule.take(0.0)
            if key is None:
                return
            before = self.town.writes
            await queue._handle(key)
            # By the pause that was asked for, not by the clock: a busy machine is late by itself.
            assert self.pause != 0 or self.town.writes > before, f"{key} would be looked at without a pause, for ever"

    def scraped(self) -> str:
        return generate_latest(self.controller.metrics.registry).decode()


async def lived_through(town: Town, folder: Path) -> tuple[Operator, str]:
    """The operator after all that it does with a town, and what Prometheus was told. Raises what left its object."""
    operator = Operator(town, folder)
    await operator.hear()
    await operator.work()
    await operator.look()
    await operator.work()
    told = operator.scraped()
    await operator.forget()
    await operator.work()
    return operator, told
