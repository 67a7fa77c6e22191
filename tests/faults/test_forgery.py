"""A tenant with the role `edit` forges what the operator reads; a job of another tenant under the same profile watches.

Every kind, verb and field is tried: with the chart's policies nearly all of it is refused, and without them nothing of
it changes a decision about another's job, a limit, a deadline or a figure.
"""

import asyncio
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import aiohttp
import pytest

from finetune_api.failures import TerminationMessage
from support import admitting, forging, rights
from support.admitting import RBAC, registered
from support.api import Answer, Api, Object
from support.charting import of_kind, render
from support.forging import CHILDREN, KINDS
from support.operating import GROUP, Operator, Proxy, Scene
from support.reporting import install_crds
from support.rights import token_of
from support.s3 import unused_port
from support.tally import Tally
from support.waiting import eventually
from support.world import PREPARED, make_profile

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
T = TypeVar("T")
JOBS = 10
"""Of the tenant who forges without policies: each is spoiled in some ways."""
TENANT = [{"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["*"]}]
MORE = [
    {"apiGroups": ["*"], "resources": ["*/status", "pods/binding", "pods/ephemeralcontainers"], "verbs": ["*"]},
    {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs/status"], "verbs": ["*"]},
]
"""Of one who may write more than `edit` does: policies hold them all the same."""


@dataclass(frozen=True)
class Stage:
    """Two tenants, one operator and one profile, which has room for the jobs of both and for one more."""

    honest: Scene
    forger: Scene
    token: str
    """The forger's."""
    metrics: int
    began: float

    @property
    def api(self) -> Api:
        return self.honest.api

    def path(self, kind: str, name: str = "") -> str:
        api, plural, _ = KINDS[kind]
        return self.forger.path(plural, name, api)

    async def looked_at(self) -> None:
        """Returns when the operator has looked at everything twice since now."""
        for _ in range(2):
            since = time.time()
            await eventually(
                lambda: self.figures("resync_timestamp_seconds"),
                "a look at everything",
                until=lambda found, since=since: sum(found.values()) > since,  # type: ignore[misc]
                timeout=60,
            )

    async def figures(self, *names: str) -> dict[str, float]:
        """The series of these metrics, by their text."""
        async with aiohttp.request("GET", f"http://127.0.0.1:{self.metrics}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        wanted = re.compile(rf"finetune_operator_({'|'.join(names)})(?=[{{ ])")
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if wanted.match(line))}

    async def decided(self) -> Object:
        """Everything that was decided about the honest tenant's job, and what is shown of their namespace."""
        status = await self.honest.status()
        found: Object = {"status": {key: value for key, value in status.items() if key != "trainerStatus"}}
        for kind in CHILDREN:
            api, plural, _ = KINDS[kind]
            for item in await self.api.items(self.honest.path(plural, api=api)):
                data = item["metadata"]
                kept = {key: data.get(key) for key in ("uid", "labels", "annotations", "deletionTimestamp")}
                found[f"{plural}/{data['name']}"] = [kept, item.get("spec"), item.get("data")]
        figures = await self.figures("gpus", "gpus_wanted", "namespace_jobs")
        return found | {key: value for key, value in figures.items() if f'"{self.honest.namespace}"' in key}

    async def usage(self, namespace: str) -> int:
        profile = (await self.api.get(f"{GROUP}/finetuneprofiles/{self.honest.profile}")).must(200)
        return int(profile["status"]["usage"][namespace]["gpuSeconds"])

    async def unharmed(self, before: Object) -> dict[str, str]:
        """What is wrong, by the claim that it breaks; empty texts where nothing is."""
        await self.looked_at()
        after = await self.decided()
        changed = {key: (value, after.get(key)) for key, value in before.items() if after.get(key) != value}
        passed = time.time() - self.began
        claims = {"decisions about the other's job": f"{changed}" if changed or after.keys() != before.keys() else ""}
        spent = await self.usage(self.honest.namespace)
        claims["the other's budget"] = "" if 0 < spent <= passed + 5 else f"{spent} of at most {passed:.0f} GPU-seconds"
        spent = await self.usage(self.forger.namespace)
        most = JOBS * (passed + 5)
        claims["the forger's budget"] = "" if spent <= most else f"{spent} of at most {most:.0f} GPU-seconds"
        gpus = await self.figures("gpus")
        claims["GPUs that are shown"] = "" if sum(gpus.values()) <= JOBS + 1 else f"{gpus}"
        wrong = []
        for job in await self.api.items(self.forger.path("finetunejobs", api=GROUP)):
            for attempt in (job.get("status") or {}).get("attempts") or ():
                terms = {"schedulingGraceSeconds": 300, "maxActiveDeadlineSeconds": 7200}
                fair = {"profile": self.honest.profile, "gpus": 1, "terms": terms}
                if {key: attempt.get(key) for key in fair} != fair:
                    wrong.append((job["metadata"]["name"], attempt))
        claims["the forger's own limits"] = f"{wrong}" if wrong else ""
        # The room that is left is the next one's.
        await self.honest.submit("w")
        await ready(self.honest, "w")
        await self.honest.reaches("Starting", "w", timeout=60)
        return claims


async def ready(scene: Scene, name: str) -> None:
    """`prepare` has run."""
    await scene.reaches("Preparing", name, timeout=60)
    await scene.end(f"{name}-prepare", message=TerminationMessage(prepared=PREPARED))


async def started(scene: Scene, name: str) -> None:
    await scene.submit(name)
    await ready(scene, name)
    await scene.run(f"{name}-0")
    await scene.reaches("Running", name, timeout=60)


async def some_at_a_time(calls: Iterable[Awaitable[T]], most: int = 8) -> list[T]:
    slots = asyncio.Semaphore(most)

    async def one(call: Awaitable[T]) -> T:
        async with slots:
            return await call

    return await asyncio.gather(*(one(call) for call in calls))


async def tenant(api: Api, namespace: str, more: list[Object]) -> str:
    """A token of one who has the ClusterRole `edit` in the namespace, and jobs."""
    token = await admitting.tenant(api, namespace, "mallory", [*TENANT, *more])
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"}
    subjects = [{"kind": "ServiceAccount", "name": "mallory", "namespace": namespace}]
    binding = {"metadata": {"name": "edit"}, "roleRef": ref, "subjects": subjects}
    (await api.create(f"{RBAC}/namespaces/{namespace}/rolebindings", binding)).must(201)
    return token


@asynccontextmanager
async def staged(
    cluster: "Sandbox", api: Api, namespace: str, folder: Path, *, policies: bool, more: list[Object], jobs: int
) -> AsyncIterator[Stage]:
    """The operator runs under its own account, with what the chart grants it; `policies`: and with those in force."""
    await install_crds(api)
    other, release, port = f"{namespace}-m", f"ft-{secrets.token_hex(4)}", unused_port()
    (await api.create("/api/v1/namespaces", {"metadata": {"name": other}})).must(201)
    token = await tenant(api, other, more)
    manifests = render({"watchNamespaces": [namespace, other]}, release, namespace)
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    roles, laws = rights.of_account(manifests, release), [m for kind in kinds for m in of_kind(manifests, kind)]
    limits: Object = {"maxActiveDeadlineSeconds": 7200}
    room = {"gpus": jobs + 2, "gpusPerNamespace": jobs + 1}
    profile = make_profile(release, default=False, networkPolicy=True, limits=limits, concurrency=room,
                           budget={"gpuHours": 1000}, allowedNamespaces=[namespace, other])  # fmt: skip
    del profile["metadata"]["resourceVersion"]
    (await api.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": release}})).must(201)
    (await api.create(f"{GROUP}/finetuneprofiles", profile)).must(201)
    await rights.apply(api, roles)
    try:
        async with registered(api, laws if policies else []), Proxy.running(cluster.kubeconfig) as proxy:
            proxy.headers = {"Authorization": f"Bearer {await token_of(api, namespace, release)}"}
            operator = Operator(folder, proxy, f"{namespace} {other}")
            began = time.time()
            await operator.start(METRICS_PORT=str(port), RESYNC_SECONDS="1")
            honest = Scene(api, namespace, release, operator, proxy)
            stage = Stage(honest, replace(honest, namespace=other), token, port, began)
            try:
                await started(honest, "j")
                await some_at_a_time(started(stage.forger, f"m{number}") for number in range(jobs))
                await in_force(stage, policies=policies)
                yield stage
                assert operator.process
                assert operator.process.returncode is None
            finally:
                await operator.stop()
    finally:
        await released(api, other)
        await rights.remove(api, roles)
        await api.delete(f"{GROUP}/finetuneprofiles/{release}")
        await api.delete(f"/api/v1/namespaces/{other}")


async def in_force(stage: Stage, *, policies: bool) -> None:
    """The forger's rights count, and so do policies: they take some time."""
    path, note = stage.path("configmap", "m0-0"), {"metadata": {"annotations": {"probe": "x"}}}
    wanted = 403 if policies else 200

    async def tried() -> Answer:
        return await stage.api.patch(path, note, token=stage.token, dryRun="All")

    await eventually(tried, "rights", until=lambda a: a.status == wanted and "RBAC" not in str(a.body), timeout=30)
    await stage.looked_at()


async def released(api: Api, namespace: str) -> None:
    """Takes away what was put there to keep objects from going."""
    for group, plural, _ in KINDS.values():
        base = f"{group}/namespaces/{namespace}/{plural}"
        for item in await api.items(base):
            if "example.com/hold" in (item["metadata"].get("finalizers") or ()):
                path = f"{base}/{item['metadata']['name']}"
                await api.patch(path, {"metadata": {"finalizers": None}})


async def targets(stage: Stage, job: str) -> Mapping[str, str]:
    """Where each kind of object of one of the forger's jobs is."""
    (pod,) = await stage.forger.pods(f"{job}-0")
    names = {"gang": f"{job}-0", "prepare": f"{job}-prepare", "pod": pod["metadata"]["name"], "finetunejob": job}
    return {kind: stage.path(kind, names.get(kind, f"{job}-0")) for kind in KINDS}


def told(what: str, answers: Mapping[str, Answer]) -> Counter[str]:
    """Counts and prints what became of attempts."""

    def kind(answer: Answer) -> str:
        if answer.status < 400:
            return "accepted"
        text = str(answer.body)
        return "by policy" if "ValidatingAdmissionPolicy" in text else "gone" if answer.status == 404 else "by the API"

    found = Counter(kind(answer) for answer in answers.values())
    print(f"{what}: {len(answers)} tried, {dict(found)}")
    return found


def deletions(stage: Stage, job: Mapping[str, str]) -> Mapping[str, tuple[str, Object]]:
    """Every way to delete each kind."""
    found: dict[str, tuple[str, Object]] = {}
    for policy in ("Orphan", "Foreground", "Background"):
        for kind in CHILDREN:
            found[f"{kind}: delete: {policy}"] = (job[kind], {"propagationPolicy": policy})
    for kind in ("configmap", "service", "networkpolicy"):
        found[f"{kind}: deletecollection"] = (stage.path(kind), {})
    return found


async def test_with_the_policies_nearly_everything_is_refused(
    cluster: "Sandbox", api: Api, namespace: str, tmp_path: Path, whole: bool, tally: Tally
) -> None:
    async with staged(cluster, api, namespace, tmp_path, policies=True, more=MORE, jobs=1) as stage:
        before = await stage.decided()
        uid = (await api.get(stage.path("finetunejob", "m0"))).must(200)["metadata"]["uid"]
        theirs = (await api.get(stage.honest.job_path())).must(200)["metadata"]["uid"]
        paths = await targets(stage, "m0")
        verbs = forging.WRITES if whole else ("merge", "replace")
        cells = list(forging.changes(theirs, stage.honest.profile, verbs=verbs))
        changed = await some_at_a_time(forging.attempt(api, paths[cell.kind], cell, stage.token) for cell in cells)
        changes = {str(cell): answer for cell, answer in zip(cells, changed, strict=True)}
        told("changes", changes)
        made = forging.creations(stage.forger.namespace, uid, theirs, stage.honest.profile)
        made["gang: create: by its template alone"] = forging.template_only(stage.forger.namespace)
        created = await some_at_a_time(api.create(path, body, token=stage.token) for path, body in made.values())
        creations = dict(zip(made, created, strict=True))
        told("creations", creations)
        gone = {}
        for title, (path, options) in deletions(stage, paths).items():
            gone[title] = await api.delete(path, options, token=stage.token)
        told("deletions", gone)
        results = {title: _expected(title, answer) for title, answer in (changes | creations | gone).items()}
        tally.count("forgery: refused", results)
        tally.count("forgery: unharmed", await stage.unharmed(before))


def _expected(title: str, answer: Answer) -> str:
    """What is wrong with the answer, empty where nothing is."""
    kind, verb, field = [*title.split(": ", 2), ""][:3]
    own = kind == "finetunejob" and not field.startswith("status")
    brake = verb == "delete" and (kind == "pod" or (kind in ("gang", "prepare") and field != "Orphan"))
    if own or brake:
        # A job's own metadata are its author's; whoever deletes pods or a Job stops what is theirs.
        return "" if answer.status < 500 else f"{answer.status}: {answer.body}"
    refused = 400 <= answer.status < 500 and answer.status != 404
    return "" if refused else f"{answer.status}: {answer.body}"


async def test_without_policies_nothing_of_anothers_changes(
    cluster: "Sandbox", api: Api, namespace: str, tmp_path: Path, tally: Tally
) -> None:
    async with staged(cluster, api, namespace, tmp_path, policies=False, more=[], jobs=JOBS) as stage:
        before = await stage.decided()
        theirs = (await api.get(stage.honest.job_path())).must(200)["metadata"]["uid"]
        uid = (await api.get(stage.path("finetunejob", "m0"))).must(200)["metadata"]["uid"]
        places = await some_at_a_time(targets(stage, f"m{number}") for number in range(JOBS))
        cells = list(forging.changes(theirs, stage.honest.profile, verbs=("merge",), status=False))
        changes = {}
        for number, cell in enumerate(cells):
            path = places[number % JOBS][cell.kind]
            changes[str(cell)] = await forging.attempt(api, path, cell, stage.token)
        accepted = told("changes", changes)
        made = forging.creations(stage.forger.namespace, uid, theirs, stage.honest.profile)
        made["gang: create: by its template alone"] = forging.template_only(stage.forger.namespace)
        created = await some_at_a_time(api.create(path, body, token=stage.token) for path, body in made.values())
        accepted += told("creations", dict(zip(made, created, strict=True)))
        await stage.looked_at()
        gone = {}
        for number, (title, (path, options)) in enumerate(deletions(stage, places[0]).items()):
            where = places[number % JOBS].get(title.split(":")[0], path) if "collection" not in title else path
            gone[title] = await api.delete(where, options, token=stage.token)
        accepted += told("deletions", gone)
        # Without policies a tenant may do nearly all of it.
        assert accepted["accepted"] > 200
        claims = await stage.unharmed(before)
        results = {**dict.fromkeys((*changes, *made, *gone), ""), **claims}
        tally.count("forgery: harmless", results)
