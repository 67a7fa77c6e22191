"""A cluster in memory for the operator's pure parts: objects, a clock, and what a kubelet would do, in words of tests.

It keeps what was written and nothing else; what a real API server does beyond that is tested against one.
"""

import copy
import datetime
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage, TrainingResult
from finetune_api.jobstatus import FineTuneJobStatus
from finetune_api.run import PreparedSummary
from finetune_api.sizing import ModelShape
from finetune_operator.accept import Subject
from finetune_operator.cluster import ApiError, TokenUser
from finetune_operator.manifests import Context
from finetune_operator.reconcile import NotYet, reconcile
from finetune_operator.turns import Line
from support.manifests import job_manifest

Object = dict[str, Any]
START = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
CONTEXT = Context("https://progress.example:8443", "-----BEGIN CERTIFICATE-----\n", "0.1.0")
SHAPE = ModelShape(
    architecture="LlamaForCausalLM",
    parameters=1_000_000,
    hidden_size=64,
    layers=2,
    vocab_size=1000,
    linear_parameters=800_000,
    target_features=4096,
    largest_layer_parameters=400_000,
    max_positions=2048,
    dtype="Float32",
)
PREPARED = PreparedSummary(
    index_uri="s3://adapters/team-a/.scratch/job-uid/data/index.json",
    index_sha256="a" * 64,
    report_uri="s3://adapters/team-a/.scratch/job-uid/data/data-report.json",
    model=SHAPE,
    train_examples=1000,
    validation_examples=50,
    test_examples=0,
    train_tokens=50_000,
    dropped=3,
    max_tokens=200,
)
RESULT = TrainingResult(uri="s3://adapters/team-a/support-bot/u/", manifest_sha256="b" * 64, size_bytes=1234)


class Crash(BaseException):
    """The process is gone: nothing after this write happens, and no handler of ours catches it."""


def rfc3339(time: datetime.datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


@dataclass(frozen=True)
class JobBuilder:
    """`make_job().with_policy(suspend=True).build()` is a FineTuneJob as the API server sends it."""

    raw: Object

    def with_spec(self, **members: Any) -> "JobBuilder":
        return JobBuilder({**self.raw, "spec": {**self.raw["spec"], **members}})

    def with_policy(self, **members: Any) -> "JobBuilder":
        return self.with_spec(runPolicy={**self.raw["spec"].get("runPolicy", {}), **members})

    def with_meta(self, **members: Any) -> "JobBuilder":
        return JobBuilder({**self.raw, "metadata": {**self.raw["metadata"], **members}})

    def with_status(self, status: FineTuneJobStatus) -> "JobBuilder":
        return JobBuilder({**self.raw, "status": status.to_json()})

    def build(self) -> Object:
        return copy.deepcopy(self.raw)


def make_job(name: str = "support-bot") -> JobBuilder:
    raw = job_manifest(name)
    raw["metadata"] |= {
        "uid": "job-uid",
        "generation": 1,
        "resourceVersion": "1",
        "creationTimestamp": rfc3339(START),
    }
    return JobBuilder(raw)


def make_profile(name: str = "laptop", *, default: bool = True, **spec: Any) -> Object:
    annotations = {"finetune.dev/default-profile": "true"} if default else {}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneProfile",
        "metadata": {"name": name, "annotations": annotations, "generation": 1, "resourceVersion": "1"},
        "spec": {"image": "registry.example/trainer@sha256:" + "c" * 64, **spec},
    }


@dataclass
class World:
    """Implements the operator's `Cluster`. `crash_after`: the write, counted from 1, after which the operator dies."""

    job: Object
    profiles: list[Object] = field(default_factory=lambda: [make_profile()])
    now: datetime.datetime = START
    objects: dict[tuple[str, str], Object] = field(default_factory=dict)
    events: list[Object] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    writes: int = 0
    crash_after: int | None = None
    line: Line = field(default_factory=Line)
    workloads: list[Object] | None = field(default_factory=list)
    """What Kueue made of its gang; None: there is no Kueue."""
    unreachable: tuple[str, ...] = ()
    """Kinds that cannot be read."""
    gone: bool = False
    _uids: Any = field(default_factory=lambda: itertools.count(1))

    # The operator's side.

    def _wrote(self) -> None:
        self.writes += 1
        if self.writes == self.crash_after:
            raise Crash

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        if kind == "FineTuneJob":
            return None if self.gone else copy.deepcopy(self.job)
        if kind in self.unreachable:
            raise ApiError(0, "Unreachable", "connection refused")
        if kind == "FineTuneProfile":
            return next((p for p in self.profiles if p["metadata"]["name"] == name), None)
        return copy.deepcopy(self.objects.get((kind, name)))

    async def get_whole(self, kind: str, namespace: str | None, name: str) -> Object | None:
        return await self.get(kind, namespace, name)

    async def list_children(self, kind: str, namespace: str, job: str) -> list[Object]:
        if kind in self.unreachable:
            raise ApiError(0, "Unreachable", "connection refused")
        return [copy.deepcopy(o) for (k, _), o in self.objects.items() if k == kind]

    async def list_profiles(self) -> list[Object]:
        return self.profiles

    def list_all(self, kind: str, namespaces: tuple[str, ...]) -> AsyncIterator[Object]:
        raise NotImplementedError

    async def create(self, manifest: Object) -> Object:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if (kind, name) in self.objects:
            raise ApiError(409, "AlreadyExists", name)
        self.put(manifest)
        self.created.append(f"{kind}/{name}")
        self._wrote()
        return self.objects[kind, name]

    async def delete(self, kind: str, namespace: str, name: str, uid: str, resource_version: str | None = None) -> bool:
        if kind == "FineTuneJob":
            if (uid, resource_version) != (self.job["metadata"]["uid"], self.job["metadata"]["resourceVersion"]):
                return False
            self.gone = True
        else:
            found = self.objects.get((kind, name))
            if found is None or found["metadata"]["uid"] != uid:
                return False
            del self.objects[kind, name]
        self.deleted.append(f"{kind}/{name}")
        self._wrote()
        return True

    async def patch_status(
        self, namespace: str, name: str, uid: str, patch: Object, resource_version: str | None = None
    ) -> Object | None:
        meta = self.job["metadata"]
        if self.gone or meta["uid"] != uid or resource_version not in (None, meta["resourceVersion"]):
            return None
        self.changed()
        self.job["status"] = merge(self.job.get("status", {}), patch)
        self._wrote()
        return copy.deepcopy(self.job)

    async def patch_profile_status(self, name: str, patch: Object) -> bool:
        found = await self.get("FineTuneProfile", None, name)
        if found is not None:
            found["status"] = merge(found.get("status"), patch)
        return found is not None

    async def list_workloads(self, namespace: str, job_uid: str) -> list[Object] | None:
        return self.workloads

    async def post_event(self, event: Object) -> None:
        self.events.append(event)

    async def token_review(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        raise NotImplementedError

    async def get_pod(self, namespace: str, name: str) -> Object | None:
        raise NotImplementedError

    async def get_job(self, namespace: str, name: str) -> Object | None:
        raise NotImplementedError

    async def patch_trainer_status(
        self, namespace: str, name: str, uid: str, trainer_status: Object, resource_version: str | None = None
    ) -> bool:
        raise NotImplementedError

    # The test's side.

    async def reconcile(self) -> float | None:
        """One reconcile; after how many seconds the next one is asked for."""
        key = self.job["metadata"]["namespace"], self.job["metadata"]["name"]
        result = await reconcile(self, key, CONTEXT, lambda: self.now, line=self.line)
        return result.after

    async def settle(self) -> float | None:
        """Reconciles until nothing is written any more, a crashed operator being started again each time.

        Its own writes wake no operator: what is still to do after them, it must have asked for, or a child that it
        deleted tells of it.
        """
        asked: float | None = 0.0
        for _ in range(12):
            before = self.writes, len(self.deleted)
            try:
                after = await self.reconcile()
            except (Crash, NotYet) as error:
                if isinstance(error, NotYet) and self.writes == before[0]:
                    raise  # What it waits for is the test's to do.
                asked = 0.0
                continue
            if self.writes == before[0]:
                assert after is None or (asked is not None and asked <= after), "it would come back too late"
                return after
            assert asked == 0.0, "nothing would have called for this"
            asked = 0.0 if len(self.deleted) > before[1] else after
        raise AssertionError("it never comes to rest")

    def later(self, seconds: float) -> None:
        self.now += datetime.timedelta(seconds=seconds)

    def set_policy(self, **members: Any) -> None:
        self.job["spec"].setdefault("runPolicy", {}).update(members)
        self.job["metadata"]["generation"] += 1
        self.changed()

    def changed(self) -> None:
        """Somebody wrote the FineTuneJob."""
        self.job["metadata"]["resourceVersion"] = str(int(self.job["metadata"]["resourceVersion"]) + 1)

    @property
    def deleted_jobs(self) -> list[str]:
        return [name for name in self.deleted if name.startswith("Job/")]

    @property
    def status(self) -> FineTuneJobStatus:
        return Subject.read(self.job).status

    @property
    def state(self) -> str | None:
        return self.status.state

    def names(self, kind: str) -> list[str]:
        return sorted(name for found, name in self.objects if found == kind)

    def put(self, manifest: Object) -> Object:
        """The object as if somebody else had created it."""
        stored = copy.deepcopy(manifest)
        stored["metadata"] |= {
            "uid": f"uid-{manifest['metadata']['name']}-{next(self._uids)}",
            "creationTimestamp": rfc3339(self.now),
        }
        self.objects[manifest["kind"], manifest["metadata"]["name"]] = stored
        return stored

    def pod(self, job: str, index: int = 0) -> Object:
        """The pod of a Job's worker: pending where it is new."""
        name = f"{job}-{index}-x"
        if ("Pod", name) not in self.objects:
            owner = self.objects["Job", job]
            self.put(
                {
                    "kind": "Pod",
                    "metadata": {
                        "name": name,
                        "labels": owner["metadata"]["labels"],
                        "annotations": {"batch.kubernetes.io/job-completion-index": str(index)},
                        "ownerReferences": [{"kind": "Job", "uid": owner["metadata"]["uid"], "controller": True}],
                    },
                    "spec": {"nodeName": f"node-{index}"},
                    "status": {"phase": "Pending"},
                }
            )
        return self.objects["Pod", name]

    def pods(self, job: str) -> list[Object]:
        return [self.pod(job, index) for index in range(self.objects["Job", job]["spec"]["completions"])]

    def place(self, job: str, count: int) -> None:
        """So many pods of the Job are on nodes, and there is no room for the others."""
        full = {"status": "False", "reason": "Unschedulable", "message": f"0/{count} nodes are available"}
        for index, pod in enumerate(self.pods(job)):
            fact = {"status": "True", "lastTransitionTime": rfc3339(self.now)} if index < count else full
            pod["status"] = {"phase": "Pending", "conditions": [{"type": "PodScheduled", **fact}]}
            if index >= count:
                pod["spec"].pop("nodeName", None)

    def run(self, job: str) -> None:
        """Every pod of the Job runs."""
        for pod in self.pods(job):
            pod["status"] = {"phase": "Running", **container({"running": {"startedAt": rfc3339(self.now)}})}

    def admit(self, job: str) -> None:
        """Kueue admits the Job and resumes it."""
        self.workloads = [{"metadata": {}, "status": {"conditions": [{"type": "Admitted", "status": "True"}]}}]
        self.objects["Job", job]["spec"]["suspend"] = False

    def end(self, job: str, index: int = 0, message: TerminationMessage | None = None, **terminated: Any) -> None:
        """One pod's container ends, with this message; the Job goes on."""
        code = EXIT_CODES.get(message.reason, 0) if message and message.reason else 0
        text = {"message": message.encode().decode()} if message else {}
        times = {"startedAt": rfc3339(self.now), "finishedAt": rfc3339(self.now)}
        ended = {"exitCode": code, **times, **text, **terminated}
        phase = "Failed" if ended["exitCode"] else "Succeeded"
        self.pod(job, index)["status"] |= {"phase": phase, **container({"terminated": ended})}

    def finish(self, job: str, kind: str, message: str = "") -> None:
        """The Job gets its last condition."""
        ended = {"type": kind, "status": "True", "lastTransitionTime": rfc3339(self.now), "message": message}
        self.objects["Job", job]["status"] = {"conditions": [ended]}

    def prepared(self, summary: PreparedSummary = PREPARED) -> None:
        """`prepare` succeeds."""
        job = f"{self.job['metadata']['name']}-prepare"
        self.end(job, message=TerminationMessage(prepared=summary))
        self.finish(job, "Complete")

    def fail(self, job: str, reason: Reason, message: str = "it broke", index: int = 0, **said: Any) -> None:
        """One pod fails, the Job controller removes the others, the Job fails."""
        self.end(job, index, TerminationMessage(reason=reason, message=message, **said))
        for name in [n for k, n in self.objects if k == "Pod" and n.startswith(f"{job}-")]:
            if name != f"{job}-{index}-x":
                del self.objects["Pod", name]
        self.finish(job, "Failed", "Container trainer failed with exit code 1 matching FailJob rule at index 1")

    def complete(self, job: str, result: TrainingResult | None = RESULT) -> None:
        for index in range(self.objects["Job", job]["spec"]["completions"]):
            self.end(job, index, TerminationMessage(result=result if index == 0 else None))
        self.finish(job, "Complete")

    def sweep(self, job: str) -> None:
        """The pods of a Job that was deleted end and go."""
        for key in [k for k in self.objects if k[0] == "Pod" and k[1].startswith(f"{job}-")]:
            del self.objects[key]


async def started(world: World, *, attempt_runs: bool = True) -> World:
    """The world at the point where attempt 0 exists, and runs."""
    await world.settle()
    world.run(f"{world.job['metadata']['name']}-prepare")
    world.prepared()
    await world.settle()
    if attempt_runs:
        world.run(f"{world.job['metadata']['name']}-0")
        await world.settle()
    return world


def container(state: Object) -> Object:
    return {"containerStatuses": [{"name": "trainer", "state": state}]}


def merge(before: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged
