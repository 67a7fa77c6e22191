"""Odd objects in a real API server, the operator as a process: another tenant's jobs end as soon as without them."""

import asyncio
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from support.api import Api, idle_pod
from support.kubelet import Kubelet
from support.operating import GROUP, Scene
from support.poison import Change, Stage, changes, dumped, put, wrecked
from support.town import stages
from support.waiting import eventually

if TYPE_CHECKING:
    from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
SEED = 20260301
"""Of the odd objects: the same ones each time."""
KINDS = ("FineTuneJob", "Job", "Pod", "message", "FineTuneProfile")
PATHS = {
    "FineTuneJob": f"{GROUP}/namespaces/{{}}/finetunejobs",
    "FineTuneProfile": f"{GROUP}/finetuneprofiles",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "Pod": "/api/v1/namespaces/{}/pods",
}
AT_ONCE = 4
Object = dict[str, Any]


def drawn(lives: Sequence[Stage], count: int) -> list[dict[str, list[Object]]]:
    """So many wrecked stages of a job's life."""
    found: list[dict[str, list[Object]]] = []

    @seed(SEED)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(lives), changes(KINDS))
    def draw(stage: Stage, made: list[Change]) -> None:
        found.append(wrecked(stage, made))

    draw()
    return found


class Poisoner:
    """Writes what the server takes, with an administrator's rights, statuses included."""

    def __init__(self, api: Api, namespace: str, profile: str) -> None:
        self.api, self.namespace, self.profile = api, namespace, profile
        self.answers: Counter[str] = Counter()
        self.made: list[str] = []

    async def write(self, number: int, case: dict[str, list[Object]]) -> None:
        """One job with its children, as far as they are taken: objects first, then what their statuses say."""
        uids: dict[str, str] = {}
        told: list[tuple[str, str, Any]] = []
        for kind in ("FineTuneProfile", "FineTuneJob", "Job", "Pod"):
            for index, raw in enumerate(case.get(kind, ())):
                if not isinstance(raw, dict):
                    continue
                path, body = self._body(kind, f"p{number}", index, raw)
                answer = await self._send("POST", path, _renamed(body, uids))
                self.answers[f"{kind} {answer.status}"] += 1
                if answer.status != 201:
                    continue
                meta = answer.body["metadata"]
                self.made.append(f"{path}/{meta['name']}")
                before = raw["metadata"].get("uid") if isinstance(raw.get("metadata"), dict) else None
                if before and isinstance(before, str):
                    uids |= dict.fromkeys((before, before.replace("bot", f"p{number}")), meta["uid"])
                if "status" in raw:
                    told.append((kind, self.made[-1], raw["status"]))
        for kind, path, status in reversed(told):
            said = _renamed(status, uids | {"bot": path.rpartition("/")[2].partition("-")[0]})
            answer = await self._send("PATCH", f"{path}/status", {"status": said})
            self.answers[f"{kind}/status {answer.status}"] += 1

    def _body(self, kind: str, name: str, index: int, raw: Object) -> tuple[str, Object]:
        """Where to and what is sent. Names are sound ones: an odd one is refused, or is any name."""
        meta = raw.get("metadata") if isinstance(raw.get("metadata"), dict) else {}
        sound = {key: meta[key] for key in ("labels", "annotations", "ownerReferences") if key in meta}
        body = {**raw, "metadata": sound | {"name": meta.get("name")}}
        body.pop("status", None)
        body = _renamed(body, {"bot": name, "shared": self.profile})
        if kind == "FineTuneProfile":
            body["metadata"]["name"] = f"{self.namespace}-{name}"
        elif kind == "FineTuneJob" or not isinstance(body["metadata"]["name"], str):
            body["metadata"]["name"] = name if kind == "FineTuneJob" else f"{name}-x{index}"
        if kind != "FineTuneProfile":
            body["metadata"]["namespace"] = self.namespace
        if kind == "Job":
            body = put(body, ("spec", "suspend"), True)
        if kind == "Pod":
            body["spec"] = idle_pod(name)["spec"]
            owners = body["metadata"].get("ownerReferences")
            for owner in owners if isinstance(owners, list) else ():
                if isinstance(owner, dict):
                    owner |= {"apiVersion": "batch/v1", "name": f"{name}-0"}
        return PATHS[kind].format(self.namespace), body

    async def _send(self, method: str, path: str, body: Any) -> Any:
        kind = "application/json" if method == "POST" else "application/merge-patch+json"
        return await self.api.call(method, path, data=dumped(body).encode(errors="replace"), content_type=kind)

    async def clear(self) -> None:
        await gathered([self.api.delete(path, {"propagationPolicy": "Background"}) for path in reversed(self.made)])
        self.made.clear()


def _renamed(value: Any, names: Mapping[str, str], depth: int = 100) -> Any:
    """The value with these words in place of others, in every text; what is nested deeper than Python sends is null."""
    if not depth:
        return None
    if isinstance(value, str):
        for old, new in names.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {_renamed(key, names): _renamed(inner, names, depth - 1) for key, inner in value.items()}
    return [_renamed(inner, names, depth - 1) for inner in value] if isinstance(value, list) else value


async def gathered(calls: Sequence[Awaitable[Any]]) -> None:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(call: Awaitable[Any]) -> None:
        async with slots:
            await call

    await asyncio.gather(*map(one, calls))


async def span(scene: Scene, names: Sequence[str]) -> float:
    """Seconds from the manifests of these jobs to the last one's end."""
    start = time.monotonic()
    await gathered([scene.submit(name) for name in names])

    async def over() -> list[str]:
        jobs = await scene.api.items(scene.path("finetunejobs", api=GROUP))
        return [j["metadata"]["name"] for j in jobs if (j.get("status") or {}).get("state") == "Complete"]

    await eventually(over, "the end of all", until=lambda done: set(names) <= set(done), timeout=300, interval=0.2)
    return time.monotonic() - start


async def fresh_namespace(api: Api) -> str:
    name = f"poison-{secrets.token_hex(4)}"
    (await api.create("/api/v1/namespaces", {"metadata": {"name": name}})).must(201)
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    await eventually(lambda: api.get(account), "ServiceAccount", until=lambda a: a.status == 200, timeout=30)
    return name


async def test_an_honest_tenants_jobs_end_as_soon_among_odd_objects(scene: Scene, whole: bool, tally: "Tally") -> None:
    jobs, odd, rounds = (50, 300, 5) if whole else (8, 60, 1)
    bad = await fresh_namespace(scene.api)
    cases = await asyncio.to_thread(drawn, await stages(), odd)
    poisoner, ratios = Poisoner(scene.api, bad, scene.profile), []
    await scene.operator.start(NAMESPACES=f"{scene.namespace} {bad}", RESYNC_SECONDS="2")
    process = scene.operator.process
    assert process
    try:
        async with Kubelet(scene.api, scene.namespace).running():
            await span(scene, ["warm"])
            for turn in range(rounds):
                smooth = await span(scene, [f"a{turn}-{n}" for n in range(jobs)])
                # Most is there before the jobs come, so that the operator is measured; the rest comes meanwhile.
                early = len(cases) * 9 // 10
                await gathered([poisoner.write(n, case) for n, case in enumerate(cases[:early])])
                rest = asyncio.create_task(
                    gathered([poisoner.write(early + n, case) for n, case in enumerate(cases[early:])])
                )
                ratios.append(await span(scene, [f"b{turn}-{n}" for n in range(jobs)]) / smooth)
                await rest
                await poisoner.clear()
    finally:
        await poisoner.clear()
        await scene.api.delete(f"/api/v1/namespaces/{bad}")
    assert process.returncode is None, scene.operator.log.read_text()[-4000:]
    taken = sum(count for answer, count in poisoner.answers.items() if answer.split()[-1] in ("200", "201"))
    print(f"seed {SEED}; {dict(sorted(poisoner.answers.items()))}; ratios {[round(ratio, 2) for ratio in ratios]}")
    assert taken >= odd, "too little of it was taken to say anything"
    # One round tells more of a busy machine than of the operator; the median of several does not.
    if whole:
        assert statistics.median(ratios) <= 1.5, f"with odd objects beside them the jobs took {ratios} times as long"
    tally.count("poison in a cluster", dict.fromkeys(map(str, range(len(cases))), ""))
