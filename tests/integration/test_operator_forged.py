"""Jobs that a tenant puts in the operator's way, before an API server that fills in its defaults."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from finetune_api.failures import TerminationMessage
from finetune_api.job import parse
from finetune_api.profile import FineTuneProfile
from finetune_api.sizing import Sizing
from finetune_operator import manifests
from finetune_operator.sameness import is_same_job
from support.api import Api, Object
from support.operating import Scene
from support.waiting import eventually
from support.world import CONTEXT, PREPARED, make_job, make_profile

pytestmark = pytest.mark.integration

RICH: dict[str, Any] = {
    "accelerator": {"memory": "80Gi"},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "runtimeClassName": "nvidia",
    "resources": {"cpu": "1500m", "memory": "1536Mi", "shm": "1024Mi", "ephemeralStorage": "2048Mi"},
    "prepare": {"cpu": "1000m", "memory": "2048Mi"},
    "environment": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "EMPTY", "value": ""}],
    "serviceAccounts": ["tuner"],
    "terminationGracePeriodSeconds": 30,
}
SIZING = Sizing(
    strategy="DDP", micro_batch_size=1, gradient_accumulation=1, memory_per_gpu=1, gradient_checkpointing=False
)


def jobs(profile: dict[str, Any], **spec: Any) -> list[Object]:
    """`prepare` and a gang of two."""
    job = parse(make_job("j").with_spec(distribution={"workers": 2}, **spec).build())
    made = FineTuneProfile.model_validate(make_profile(**profile))
    affinity = manifests.without(["bad-node"], strictly=True)
    gang = manifests.gang(job, made, CONTEXT, 0, PREPARED, [SIZING], affinity=affinity)
    return [m for m in (*manifests.prepare(job, made, CONTEXT), *gang) if m["kind"] == "Job"]


CASES = {
    "plain": jobs({}),
    "rich": jobs(RICH, credentials={"serviceAccountName": "tuner"}),
    "queue": jobs({}, queue={"name": "q"}, credentials={"secretRef": {"name": "s3"}}),
}


async def stored(api: Api, namespace: str, manifest: Object) -> Object:
    """The Job as the server has it, without an owner that does not exist."""
    sent = copy.deepcopy(manifest)
    sent["metadata"] |= {"namespace": namespace}
    sent["metadata"].pop("ownerReferences")
    sent["spec"]["suspend"] = manifest["spec"]["suspend"]
    found: Object = (await api.create(f"/apis/batch/v1/namespaces/{namespace}/jobs", sent)).must(201)
    return found


@pytest.mark.parametrize("case", CASES)
async def test_what_the_server_fills_in_does_not_make_it_another(api: Api, namespace: str, case: str) -> None:
    for manifest in CASES[case]:
        assert is_same_job(manifest, await stored(api, namespace, manifest)), manifest["metadata"]["name"]


def _pod(job: Object) -> Object:
    pod: Object = job["spec"]["template"]["spec"]
    return pod


CHANGES: dict[str, Callable[[Object], Any]] = {
    "more workers": lambda job: job["spec"].update(completions=3, parallelism=3),
    "a time limit": lambda job: job["spec"].update(activeDeadlineSeconds=60),
    "more retries": lambda job: job["spec"].update(backoffLimit=7),
    "other rules of failure": lambda job: job["spec"].pop("podFailurePolicy"),
    "another image": lambda job: _pod(job)["containers"][0].update(image="example.com/i:1"),
    "another command": lambda job: _pod(job)["containers"][0].update(command=["sh"]),
    "arguments": lambda job: _pod(job)["containers"][0].update(args=["-c", "id"]),
    "a variable": lambda job: _pod(job)["containers"][0]["env"].append({"name": "X", "value": "1"}),
    "a second container": lambda job: _pod(job)["containers"].append({"name": "x", "image": "example.com/i:1"}),
    "an init container": lambda job: _pod(job).update(initContainers=[{"name": "x", "image": "example.com/i:1"}]),
    "the node's network": lambda job: _pod(job).update(hostNetwork=True),
    "the node's disk": lambda job: _pod(job)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "another account": lambda job: _pod(job).update(serviceAccountName="other"),
    "a node of one's own": lambda job: _pod(job).update(nodeName="n"),
    "another scheduler": lambda job: _pod(job).update(schedulerName="mine"),
    "other names": lambda job: _pod(job).update(dnsPolicy="Default"),
    "more memory": lambda job: _pod(job)["containers"][0]["resources"]["limits"].update(memory="900Gi"),
    "a priority": lambda job: _pod(job).update(priorityClassName="system-node-critical"),
    "a token": lambda job: _pod(job).update(automountServiceAccountToken=True),
    "rights": lambda job: _pod(job)["containers"][0]["securityContext"].update(runAsUser=0),
    "a label": lambda job: job["spec"]["template"]["metadata"]["labels"].update(x="y"),
    "an annotation": lambda job: job["spec"]["template"]["metadata"].update(annotations={"x": "y"}),
    "other pods": lambda job: job["spec"].update(manualSelector=True, selector={"matchLabels": {"a": "b"}}),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_whatever_is_otherwise_makes_it_another(api: Api, namespace: str, change: str) -> None:
    for manifest in CASES["plain"]:
        forged = copy.deepcopy(manifest)
        CHANGES[change](forged)
        if forged["spec"].get("manualSelector"):
            forged["spec"]["template"]["metadata"]["labels"]["a"] = "b"
        assert not is_same_job(manifest, await stored(api, namespace, forged))


async def test_forged_jobs_decide_nothing(scene: Scene) -> None:
    """One in the way of `prepare` is replaced, one in the way of the next attempt goes, and neither is ever told of."""
    raw = await scene.submit(runPolicy={"activeDeadlineSeconds": 3600})
    jobs_path = scene.path("jobs")
    forged = copy.deepcopy(CASES["plain"][1])
    forged["spec"] |= {"completions": 1000, "parallelism": 1000, "suspend": True}
    forged["metadata"] |= {"namespace": scene.namespace, "annotations": {"finetune.dev/profile": "other"}}
    forged["metadata"]["ownerReferences"][0] |= {"name": "j", "uid": raw["metadata"]["uid"]}
    uids = set()
    for name in ("j-prepare", "j-1", "j-7"):
        forged["metadata"]["name"] = name
        uids.add((await scene.api.create(jobs_path, forged)).must(201)["metadata"]["uid"])
    await scene.operator.start(RESYNC_SECONDS="1")

    async def prepare() -> Object:
        found = await scene.api.get(scene.path("jobs", "j-prepare"))
        return found.body if found.status == 200 else {"metadata": {"uid": next(iter(uids))}}

    await eventually(prepare, "one of its own", until=lambda job: job["metadata"]["uid"] not in uids)
    await scene.reaches("Preparing")
    await scene.end("j-prepare", message=TerminationMessage(prepared=PREPARED))
    await scene.reaches("Starting")
    await eventually(scene.jobs, "the forged one to go", until=lambda found: "j-1" not in found)
    await scene.run("j-0")
    await scene.reaches("Running")
    await scene.completed("j-0")
    status = await scene.reaches("Complete")
    assert [(a["number"], a["workers"], a["gpus"]) for a in status["attempts"]] == [(0, 1, 1)]
    assert not {a["uid"] for a in status["attempts"]} & uids
