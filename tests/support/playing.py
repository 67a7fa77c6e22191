"""A scenario played with a fault in it, and held against the same scenario without one."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.api import Api, Object
from support.faulty import Call, FaultyProxy, Rule
from support.operating import GROUP, Scene
from support.reporting import install_crds
from support.scenarios import SCENARIOS, difference, left
from support.waiting import eventually
from support.warm_operator import Nursery, WarmOperator
from support.world import make_profile

logger = logging.getLogger(__name__)
AT_ONCE = 4
"""Cases that are played at a time: most of each is waiting."""
NEVER_MET = "the fault was never met"
SETTINGS = {
    # Fixed, as a Service's name is: pods are told of it.
    "PROGRESS_URL": "https://progress.example:8443",
    "API_TIMEOUT_SECONDS": "2",
    "RESYNC_SECONDS": "3",
    "WORKERS": "4",
}
CONSTANTS = {
    "finetune_operator.attempts.BACKOFF_SECONDS": 1.0,
    "finetune_operator.handlers.ANSWER_SECONDS": 2.0,
    "finetune_operator.reflector.SILENCE_SECONDS": 2.0,
    "finetune_operator.reflector.BACKOFFS": [0.1, 0.2, 0.3, 0.5] * 8,
}
"""Minutes as seconds: attempts' and watches' pauses."""
PROFILE = "faults"
LIMIT = 90.0
"""Seconds for one case."""


@dataclass(frozen=True)
class Played:
    """What a run without faults left, did and asked for."""

    objects: dict[str, Object]
    work: Counter[Call]
    calls: list[Call]
    events: Counter[str]


@dataclass(frozen=True)
class Case:
    """One scenario with one thing that goes wrong."""

    title: str
    scenario: str
    rules: Callable[[], Sequence[Rule]]
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Theatre:
    """Everything that cases share."""

    kubeconfig: Path
    api: Api
    nursery: Nursery
    directory: Path
    tls: Path
    """Of all operators: pods are told of their authority."""
    constants: Mapping[str, Any] = field(default_factory=lambda: CONSTANTS)
    smooth_runs: dict[str, Played] = field(default_factory=dict)
    only: str = ""
    """Plays only cases whose title has this in it: to look at one again."""

    async def set_up(self) -> None:
        """What is the same for all: specs are hashed with their profile's name."""
        await install_crds(self.api)
        profile = make_profile(PROFILE, default=False)
        del profile["metadata"]["resourceVersion"]
        assert (await self.api.create(f"{GROUP}/finetuneprofiles", profile)).status in (201, 409)

    @asynccontextmanager
    async def scene(self, **settings: str) -> AsyncIterator[Scene]:
        """A namespace, and an operator that is started again when it ends."""
        token = secrets.token_hex(4)
        namespace = f"test-{token}"
        (await self.api.create("/api/v1/namespaces", {"metadata": {"name": namespace}})).must(201)
        account = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        await eventually(lambda: self.api.get(account), "ServiceAccount", until=lambda a: a.status == 200, timeout=30)
        folder = self.directory / token
        folder.mkdir()
        async with self._operator(folder, namespace, settings) as operator:
            try:
                yield Scene(self.api, namespace, PROFILE, operator, operator.proxy)
            finally:
                await operator.stop()
                await self.api.delete(f"/api/v1/namespaces/{namespace}")

    @asynccontextmanager
    async def second(self, scene: Scene, **settings: str) -> AsyncIterator[WarmOperator]:
        """Another operator for the same namespace, behind a proxy of its own."""
        folder = scene.operator.directory / "second"
        folder.mkdir()
        async with self._operator(folder, scene.namespace, settings) as operator:
            yield operator

    @asynccontextmanager
    async def _operator(self, folder: Path, namespace: str, settings: Mapping[str, str]) -> AsyncIterator[WarmOperator]:
        own = SETTINGS | {"TLS_FOLDER": str(self.tls)} | settings
        async with FaultyProxy.running(self.kubeconfig) as proxy:
            assert isinstance(proxy, FaultyProxy)
            operator = WarmOperator(
                folder, proxy, namespace, nursery=self.nursery, settings=own, constants=self.constants
            )
            proxy.kill = operator.kill
            try:
                yield operator
            finally:
                await operator.stop()

    async def smooth(self, name: str, **settings: str) -> Played:
        """The scenario without a fault, played once."""
        if name not in self.smooth_runs:
            async with self.scene(**settings) as scene:
                await scene.operator.start()
                await SCENARIOS[name](scene)
                proxy = scene.proxy
                assert isinstance(proxy, FaultyProxy)
                objects = await at_rest(scene)
                self.smooth_runs[name] = Played(objects, proxy.work, list(proxy.calls), Counter(proxy.events))
        return self.smooth_runs[name]

    async def play(self, case: Case) -> str:
        """What is otherwise than without the fault; empty: it survived."""
        smooth = await self.smooth(case.scenario)
        try:
            async with asyncio.timeout(LIMIT), self.scene(**case.settings) as scene:
                proxy = scene.proxy
                assert isinstance(proxy, FaultyProxy)
                rules = list(case.rules())
                proxy.script(*rules)
                await scene.operator.start()
                try:
                    await SCENARIOS[case.scenario](scene)
                    return await verdict(scene, smooth, rules)
                except (TimeoutError, AssertionError) as error:
                    return f"{error or type(error).__name__}\n{await seen(scene)}\n{tail(scene)}"
        except TimeoutError:
            return f"nothing came of it within {LIMIT:.0f} s"

    async def met(self, case: Case) -> str:
        """What is wrong. Which of two ways the operator takes to read something depends on how busy it is."""
        for _ in range(3):
            if not (wrong := await self.play(case)).startswith(NEVER_MET):
                break
        return wrong

    async def play_all(self, cases: Sequence[Case]) -> dict[str, str]:
        """By title, what is wrong."""
        cases = [case for case in cases if self.only in case.title]
        if self.only and not cases:
            pytest.skip(f"no case has {self.only!r} in its title")
        for name in dict.fromkeys(case.scenario for case in cases):
            await self.smooth(name)
        gate, results, start = asyncio.Semaphore(AT_ONCE), dict[str, str](), time.monotonic()

        async def one(case: Case) -> None:
            async with gate:
                results[case.title] = await self.met(case)
                logger.info(
                    "%5.0f s, %d: %s: %s",
                    time.monotonic() - start,
                    len(results),
                    case.title,
                    results[case.title] or "survived",
                )

        async with asyncio.TaskGroup() as group:
            for case in cases:
                group.create_task(one(case))
        return {case.title: results[case.title] for case in cases}


async def verdict(scene: Scene, smooth: Played, rules: Sequence[Rule]) -> str:
    """What is left, and what was created and deleted on the way, against the run without faults."""
    proxy = scene.proxy
    assert isinstance(proxy, FaultyProxy)
    if not rules[0].used:
        return f"{NEVER_MET}: {rules[0].kind} {rules[0].fault}"
    with contextlib.suppress(TimeoutError):
        await eventually(lambda: left(scene), "the same end", until=lambda o: o == smooth.objects, timeout=20)
    if "finetunejobs/j" in smooth.objects:
        await nudged(scene)
    problems = difference(smooth.objects, await left(scene))
    for call in sorted(smooth.work.keys() | proxy.work.keys()):
        if smooth.work[call] != proxy.work[call]:
            problems.append(f"{call.kind} {call.name}: {proxy.work[call]} times instead of {smooth.work[call]}")
    return "\n".join([*problems[:8], tail(scene)]) if problems else ""


async def nudged(scene: Scene) -> None:
    """The operator looks at the job once more: whatever it would still do, it does."""
    proxy = scene.proxy
    assert isinstance(proxy, FaultyProxy)

    def looks() -> Counter[str]:
        return Counter(call.kind for call in proxy.calls)

    before = looks()

    async def looked() -> bool:
        # Again and again: one that has just been started knows it from its first LIST, which may show nothing to do.
        note = {"metadata": {"annotations": {"test/nudge": secrets.token_hex(4)}}}
        (await scene.api.patch(scene.job_path(), note)).must(200)
        since = looks() - before
        # One that is deaf looks at what it lists: the second LIST comes after what the first one led to.
        return bool(since["get finetunejobs"]) or since["list finetunejobs"] > 1

    await eventually(looked, "another look", timeout=20, interval=0.5)


async def at_rest(scene: Scene) -> dict[str, Object]:
    """What is left once it stays the same."""
    before: dict[str, Object] = {}

    async def same() -> dict[str, Object]:
        nonlocal before
        now = await left(scene)
        before, unchanged = now, now == before
        return now if unchanged else {"": {}}

    return await eventually(same, "a rest", until=lambda o: "" not in o, timeout=20, interval=1.0)


async def seen(scene: Scene) -> str:
    """How far everything is."""
    lines = []
    for name, item in (await left(scene)).items():
        facts = [item.get(key) for key in ("phase", "conditions", "deleting") if item.get(key)]
        status = item.get("status") or {}
        lines.append(f"    {name} {facts or ''} {status.get('state', '')} {status.get('message', '')}")
    return "\n".join(lines)


def tail(scene: Scene) -> str:
    """The end of the operator's log."""
    log = scene.operator.log
    lines = log.read_text(errors="replace").splitlines()[-12:] if log.exists() else []
    return "\n".join(f"    {line[:400]}" for line in lines)
