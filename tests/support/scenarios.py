"""Jobs' lives from the manifest to the end, as users and kubelets drive them; what is left then, in a form that can be
compared: names of objects instead of UIDs, `T` instead of times."""

import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage
from support.api import Object
from support.operating import Scene
from support.waiting import eventually

Scenario = Callable[[Scene], Awaitable[None]]
WORKERS = 2
PATIENCE = 40.0
"""Seconds for a state to come: a fault, what the client waits after it, and a busy machine."""


async def create(scene: Scene, **policy: Any) -> None:
    await scene.submit(distribution={"workers": WORKERS}, **({"runPolicy": policy} if policy else {}))
    await prepare(scene)
    await run(scene, "j-0")


async def succeed(scene: Scene) -> None:
    await create(scene)
    await complete(scene, "j-0")


async def fail(scene: Scene) -> None:
    await create(scene)
    await end(scene, "j-0", Reason.DIVERGED)
    await scene.reaches("Failed", timeout=PATIENCE)


async def retry(scene: Scene) -> None:
    await create(scene)
    await end(scene, "j-0", Reason.HUNG)
    await run(scene, "j-1")
    await complete(scene, "j-1")


async def suspend(scene: Scene) -> None:
    await create(scene)
    await scene.policy(suspend=True)
    await scene.reaches("Suspended", timeout=PATIENCE)
    await eventually(scene.jobs, "the gang to go", until=lambda jobs: jobs == ["j-prepare"], timeout=PATIENCE)


async def resume(scene: Scene) -> None:
    await suspend(scene)
    await scene.policy(suspend=False)
    await run(scene, "j-1")
    await complete(scene, "j-1")


async def delete(scene: Scene) -> None:
    await create(scene)
    (await scene.api.delete(scene.job_path(), {"propagationPolicy": "Background"})).must(200)


async def ttl(scene: Scene) -> None:
    await create(scene, ttlSecondsAfterFinished=1)
    await finish(scene, "j-0")

    async def gone() -> bool:
        return (await scene.api.get(scene.job_path())).status == 404

    await eventually(gone, "the job to go", timeout=PATIENCE)


SCENARIOS: dict[str, Scenario] = {
    "create": create,
    "succeed": succeed,
    "fail": fail,
    "retry": retry,
    "suspend": suspend,
    "resume": resume,
    "delete": delete,
    "ttl": ttl,
}


async def prepare(scene: Scene) -> None:
    from support.world import PREPARED

    await scene.end("j-prepare", message=TerminationMessage(prepared=PREPARED))


async def run(scene: Scene, job: str) -> None:
    await scene.run(job, WORKERS)
    number = int(job.rpartition("-")[2])

    def running(status: Object) -> bool:
        attempts = status.get("attempts") or []
        return status.get("state") == "Running" and bool(attempts) and attempts[-1]["number"] == number

    await eventually(lambda: scene.status(), f"{job} to run", until=running, timeout=PATIENCE)


async def finish(scene: Scene, job: str) -> None:
    await scene.completed(job, WORKERS)


async def complete(scene: Scene, job: str) -> None:
    await finish(scene, job)
    await scene.reaches("Complete", timeout=PATIENCE)


async def end(scene: Scene, job: str, reason: Reason) -> None:
    said = TerminationMessage(reason=reason, message="it broke", rank=1, exit_code=EXIT_CODES[reason])
    await scene.end(job, index=1, workers=WORKERS, message=said, code=EXIT_CODES[reason])


# What is left.

KINDS = {
    "finetunejobs": "/apis/finetune.dev/v1alpha1",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "services": "/api/v1",
    "configmaps": "/api/v1",
}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)|\d\d:\d\d:\d\d")
METADATA = ("name", "labels", "ownerReferences", "finalizers")


async def left(scene: Scene) -> dict[str, Object]:
    """Every object of the namespace, by kind and name."""
    found: list[tuple[str, Object]] = []
    for kind, api in KINDS.items():
        found += [(kind, item) for item in await scene.api.items(scene.path(kind, api=api))]
    names = {item["metadata"]["uid"]: f"uid of {kind}/{item['metadata']['name']}" for kind, item in found}
    names |= {scene.namespace: "NAMESPACE", scene.profile: "PROFILE"}
    kept = {}
    for kind, item in found:
        name = item["metadata"]["name"]
        if name == "kube-root-ca.crt":
            continue
        if kind == "pods":
            # Their names end by chance.
            name = name.rpartition("-")[0]
            while f"pods/{name}" in kept:
                name += "+"
        kept[f"{kind}/{name}"] = anonymous(normal(kind, item), names)
    return kept


def normal(kind: str, item: Object) -> Object:
    """What of an object does not depend on when and how often it was looked at."""
    metadata = {key: item["metadata"][key] for key in METADATA if key in item["metadata"]}
    metadata["deleting"] = "deletionTimestamp" in item["metadata"]
    status = item.get("status") or {}
    if kind == "pods":
        labels = item["metadata"].get("labels") or {}
        owned = {k: v for k, v in labels.items() if "uid" not in k}
        return {"labels": owned, "phase": status.get("phase"), "deleting": metadata["deleting"]}
    if kind == "jobs":
        over = sorted(c["type"] for c in status.get("conditions") or () if c["status"] == "True")
        return {"metadata": metadata, "spec": item["spec"], "conditions": over}
    spec = {k: v for k, v in (item.get("spec") or {}).items() if not k.startswith("clusterIP")}
    data = {key: json.loads(text) if text[:1] in "[{" else text for key, text in (item.get("data") or {}).items()}
    return {"metadata": metadata, "spec": spec, "data": data, "status": status}


def anonymous(item: Object, names: dict[str, str]) -> Object:
    text = json.dumps(item, sort_keys=True)
    for uid, name in names.items():
        text = text.replace(uid, name)
    anonymised: Object = json.loads(TIME.sub("T", UUID.sub("UID", text)))
    return anonymised


def difference(expected: Any, found: Any, path: str = "") -> list[str]:
    """Where two of these differ, a line for each place."""
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = []
        for key in sorted(expected.keys() | found.keys()):
            if key not in found:
                lines.append(f"{path}/{key} is missing")
            elif key not in expected:
                lines.append(f"{path}/{key} is too many: {json.dumps(found[key])[:200]}")
            else:
                lines += difference(expected[key], found[key], f"{path}/{key}")
        return lines
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            line
            for i, pair in enumerate(zip(expected, found, strict=True))
            for line in difference(*pair, f"{path}/{i}")
        ]
    same = expected == found
    return [] if same else [f"{path}: {json.dumps(found)[:300]} instead of {json.dumps(expected)[:300]}"]
