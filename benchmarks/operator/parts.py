"""The other processes of the benchmark: the API server, a "kubelet" for prepare pods, and the bare loop.

Each is started by bench.py, says what it has to say as JSON lines, and ends when its standard input does.
Times are seconds of the monotonic clock, which all processes of a machine share.
"""

import argparse
import asyncio
import datetime
import gc
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.kube_config import load_kube_config

from finetune_api.failures import TerminationMessage
from finetune_api.run import PreparedSummary
from finetune_api.sizing import ModelShape
from finetune_operator.accept import Subject
from finetune_operator.cluster import KubeCluster
from finetune_operator.manifests import Context
from finetune_operator.observe import Observed, observe
from finetune_operator.plan import plan, to_record, with_uids
from finetune_operator.reconcile import event
from finetune_operator.status import patch
from finetune_sandbox.client import JOBS, PODS, Client
from finetune_sandbox.controlplane import ControlPlane, assets_from_environment
from finetune_sandbox.server import ApiServer

Object = dict[str, Any]

NAMESPACE = "default"
PROFILE: Object = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneProfile",
    "metadata": {"name": "bench"},
    "spec": {"image": "example.com/trainer:bench"},
}
MODEL = ModelShape(
    architecture="LlamaForCausalLM",
    parameters=10_000_000,
    hidden_size=256,
    layers=4,
    vocab_size=4096,
    linear_parameters=8_000_000,
    target_features=10_000,
    largest_layer_parameters=2_000_000,
    max_positions=2048,
    dtype="Float32",
)


def job_manifest(name: str) -> Object:
    """A FineTuneJob of two workers, as small as jobs are."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "profile": "bench",
            "baseModel": {"uri": "s3://models/tiny/"},
            "datasets": [{"name": "tickets", "uri": "s3://data/tickets.jsonl"}],
            "distribution": {"workers": 2},
            "output": {"uri": "s3://adapters/bench/"},
        },
    }


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def stamp() -> str:
    return now().isoformat().replace("+00:00", "Z")


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


async def input_lines() -> AsyncIterator[str]:
    """Lines of standard input until its end."""
    reader = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line.decode()


async def until_input_ends() -> None:
    async for _ in input_lines():
        pass


@asynccontextmanager
async def kube_cluster(kubeconfig: Path) -> AsyncIterator[KubeCluster]:
    """The operator's own client."""
    configuration = Configuration()
    await load_kube_config(str(kubeconfig), client_configuration=configuration, persist_config=False)
    cluster = KubeCluster(configuration)
    try:
        yield cluster
    finally:
        await cluster.close()


class WithoutControllers(ControlPlane):
    """etcd and kube-apiserver alone: what is measured is the operator, not a Job controller."""

    async def stop_controllers(self) -> None:
        await self._programs["kube-controller-manager"].stop()


async def serve(directory: Path) -> None:
    """An API server without controllers, a real one where `$KUBEBUILDER_ASSETS` names one, until the input ends."""
    if assets := assets_from_environment():
        plane = WithoutControllers(assets, directory)
        async with plane:
            await plane.stop_controllers()
            say(kubeconfig=str(plane.kubeconfig), server="kube-apiserver")
            await until_input_ends()
        return
    server = ApiServer()
    await server.start(directory)
    say(kubeconfig=str(server.kubeconfig), server="sandbox")
    await until_input_ends()
    await server.stop()


def termination_message() -> str:
    """What `prepare` would have said."""
    digest = "0" * 64
    summary = PreparedSummary(
        index_uri="s3://adapters/bench/.scratch/x/data/index.json",
        index_sha256=digest,
        report_uri="s3://adapters/bench/.scratch/x/data/data-report.json",
        model=MODEL,
        train_examples=1000,
        validation_examples=50,
        test_examples=0,
        train_tokens=200_000,
        dropped=3,
        max_tokens=512,
    )
    return TerminationMessage(message="prepared", prepared=summary).encode().decode()


def prepare_pod(job: Object) -> tuple[Object, Object]:
    """The pod of a prepare Job, and the status of one that succeeded."""
    meta, template = job["metadata"], job["spec"]["template"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
    index = {"batch.kubernetes.io/job-completion-index": "0"}
    labels = template["metadata"]["labels"] | index | {"batch.kubernetes.io/controller-uid": meta["uid"]}
    pod = {
        "metadata": {"name": f"{meta['name']}-0", "labels": labels, "annotations": index, "ownerReferences": [owner]},
        "spec": template["spec"] | {"nodeName": "bench"},
    }
    ended = {"exitCode": 0, "reason": "Completed", "message": termination_message()}
    state = {"terminated": ended | {"startedAt": stamp(), "finishedAt": stamp()}}
    container = {"name": "trainer", "image": "x", "imageID": "x", "ready": False, "restartCount": 0, "state": state}
    return pod, {"phase": "Succeeded", "startTime": stamp(), "containerStatuses": [container]}


def completed() -> Object:
    condition = {"status": "True", "lastProbeTime": stamp(), "lastTransitionTime": stamp()}
    return {
        "startTime": stamp(),
        "completionTime": stamp(),
        "succeeded": 1,
        "completedIndexes": "0",
        "conditions": [condition | {"type": "SuccessCriteriaMet"}, condition | {"type": "Complete"}],
    }


async def kubelet(kubeconfig: Path) -> None:
    """Completes every prepare Job, and tells when it did and when it saw a gang's Job."""
    async with await Client.from_kubeconfig(kubeconfig) as client:
        slots, tasks = asyncio.Semaphore(16), set[asyncio.Task[None]]()

        async def complete(job: Object) -> None:
            name = job["metadata"]["name"]
            pod, status = prepare_pod(job)
            async with slots:
                await client.create(PODS, NAMESPACE, pod)
                await client.patch(PODS, NAMESPACE, pod["metadata"]["name"], {"status": status}, "status")
                await client.patch(JOBS, NAMESPACE, name, {"status": completed()}, "status")
            say(seen="prepared", job=job["metadata"]["labels"]["finetune.dev/job-name"], at=time.monotonic())

        async def watch() -> None:
            async for change in client.changes(JOBS, NAMESPACE):
                if change.type == "SYNCED":
                    say(seen="ready", job="", at=time.monotonic())
                if change.type != "ADDED":
                    continue
                labels = change.object["metadata"]["labels"]
                if labels["finetune.dev/attempt"] != "prepare":
                    say(seen="gang", job=labels["finetune.dev/job-name"], at=time.monotonic())
                elif not (change.object.get("status") or {}).get("conditions"):
                    task = asyncio.create_task(complete(change.object))
                    tasks.add(task)
                    task.add_done_callback(finished)

        def finished(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                say(seen="error", job=repr(error), at=time.monotonic())

        watching = asyncio.create_task(watch())
        await until_input_ends()
        watching.cancel()


NAME, UID = "name-of-the-template", "00000000-0000-4000-8000-000000000000"


def template(context: Context) -> list[tuple[str, str]]:
    """Everything that the operator writes for one job, in its order and from its own functions: (verb, JSON)."""
    meta = {"uid": UID, "resourceVersion": "1", "generation": 1, "creationTimestamp": stamp()}
    raw = job_manifest(NAME)
    raw["metadata"] |= meta
    first, status = _writes(raw, Observed(), context)
    raw["status"] = status
    [prepare] = [body for verb, body in first if verb == "create" and body["kind"] == "Job"]
    prepare = prepare | {"metadata": prepare["metadata"] | meta | {"uid": "1" * 36}, "status": completed()}
    pod, pod_status = prepare_pod(prepare)
    pod["metadata"] |= meta
    known = Subject.read(raw).status
    second, _ = _writes(raw, observe(UID, NAME, known, [prepare], [pod | {"status": pod_status}]), context)
    return [(verb, json.dumps(body)) for verb, body in (*first, *second)]


def _writes(raw: Mapping[str, Any], observed: Observed, context: Context) -> tuple[list[tuple[str, Object]], Object]:
    subject = Subject.read(raw)
    decided = plan(subject, [PROFILE], observed, now(), context)
    recorded = to_record(subject.status, decided.status)
    made = [body | {"metadata": body["metadata"] | {"uid": "1" * 36}} for body in decided.create]
    status = with_uids(decided.status, made)
    writes: list[tuple[str, Object]] = [("status", patch(subject.status, recorded))]
    writes += [("create", body) for body in decided.create]
    writes.append(("status", patch(recorded, status)))
    told = subject.namespace, subject.name, subject.uid
    writes += [("event", event(*told, note, now())) for note in decided.events]
    return writes, status.to_json()


async def bare(kubeconfig: Path, workers: int) -> None:
    """The same writes without an operator: for each line {"name", "uid"} of the input, one after the other, through
    the operator's client, for as many jobs at a time as the operator has workers."""
    gc.freeze()  # as the operator does
    writes = template(Context(progress_url="https://127.0.0.1:8443", ca="x" * 700, version="bench"))
    jobs: asyncio.Queue[Object] = asyncio.Queue()
    async with kube_cluster(kubeconfig) as cluster:

        async def write(name: str, uid: str) -> None:
            for verb, text in writes:
                body = json.loads(text.replace(NAME, name).replace(UID, uid))
                if verb == "create":
                    await cluster.create(body)
                elif verb == "event":
                    await cluster.post_event(body)
                else:
                    await cluster.patch_status(NAMESPACE, name, uid, body)

        async def worker() -> None:
            while True:
                job = await jobs.get()
                await write(job["name"], job["uid"])
                jobs.task_done()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(worker()) for _ in range(workers)]
            say(seen="ready")
            async for line in input_lines():
                jobs.put_nowait(json.loads(line))
            await jobs.join()
            for task in tasks:
                task.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve").add_argument("directory", type=Path)
    commands.add_parser("kubelet").add_argument("kubeconfig", type=Path)
    loop = commands.add_parser("bare")
    loop.add_argument("kubeconfig", type=Path)
    loop.add_argument("workers", type=int)
    args = parser.parse_args()
    if args.command == "serve":
        asyncio.run(serve(args.directory))
    elif args.command == "kubelet":
        asyncio.run(kubelet(args.kubeconfig))
    else:
        asyncio.run(bare(args.kubeconfig, args.workers))


if __name__ == "__main__":
    main()
