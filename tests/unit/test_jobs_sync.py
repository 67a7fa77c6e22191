"""The Job controller's decisions, table by table, in virtual time."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_sandbox.jobpods import FINALIZER, INDEX, format_indexes, make_pod, parse_indexes
from finetune_sandbox.jobsync import Plan, sync
from finetune_sandbox.podstatus import timestamp

T0 = datetime(2030, 1, 1, tzinfo=UTC)
Obj = dict[str, Any]


def make_job(**spec: Any) -> Obj:
    template = {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "main"}]}}
    base = {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0, "template": template}
    return {"metadata": {"name": "j", "namespace": "ns", "uid": "job-uid"}, "spec": base | spec, "status": {}}


class World:
    """A Job, its pods and a clock; `step` carries a plan out as an API server would."""

    def __init__(self, **spec: Any) -> None:
        self.job = make_job(**spec)
        self.pods: list[Obj] = []
        self.now = T0
        self.made = 0
        self.deleted = False
        self.reasons: list[str] = []

    def step(self) -> Plan:
        plan = sync(self.job, self.pods, self.now)
        if plan.status is not None:
            self.job = self.job | {"status": plan.status}
        for pod in plan.release:
            pod["metadata"]["finalizers"].remove(FINALIZER)
        for pod in plan.delete:
            pod["metadata"]["deletionTimestamp"] = timestamp(self.now)
        for pod in plan.create:
            self.made += 1
            identity = {"uid": f"pod-{self.made}", "name": f"j-{self.made}", "creationTimestamp": timestamp(self.now)}
            self.pods.append(pod | {"metadata": pod["metadata"] | identity, "status": {"phase": "Pending"}})
        self.pods = [pod for pod in self.pods if not (_gone(pod))]
        self.reasons += [notice.reason for notice in plan.notices]
        self.deleted |= plan.delete_job
        return plan

    def settle(self) -> "World":
        for _ in range(20):
            before = (self.job["status"], [dict(pod["metadata"]) for pod in self.pods])
            self.step()
            if before == (self.job["status"], [dict(pod["metadata"]) for pod in self.pods]):
                return self
        raise AssertionError("the plans never come to rest")

    def pod(self, index: int) -> Obj:
        return next(pod for pod in self.pods if pod["metadata"]["annotations"][INDEX] == str(index) and _alive(pod))

    def run(self) -> "World":
        for pod in self.pods:
            if _alive(pod):
                pod["status"] = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        return self

    def end(self, pod: Obj, code: int, **status: Any) -> "World":
        terminated = {"exitCode": code, "finishedAt": timestamp(self.now)}
        containers = [{"name": "main", "state": {"terminated": terminated}}]
        phase = "Failed" if code else "Succeeded"
        pod["status"] = {"phase": phase, "containerStatuses": containers} | status
        return self

    def kill_terminating(self) -> "World":
        for pod in self.pods:
            if _alive(pod) and "deletionTimestamp" in pod["metadata"]:
                self.end(pod, 143)
        return self

    @property
    def status(self) -> Obj:
        return dict(self.job["status"])

    @property
    def conditions(self) -> list[tuple[str, str, str]]:
        return [(c["type"], c["status"], c["reason"]) for c in self.status.get("conditions", [])]


def _alive(pod: Obj) -> bool:
    return pod["status"]["phase"] not in ("Succeeded", "Failed")


def _gone(pod: Obj) -> bool:
    return "deletionTimestamp" in pod["metadata"] and not _alive(pod) and not pod["metadata"]["finalizers"]


GANG = {
    "podReplacementPolicy": "Failed",
    "podFailurePolicy": {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
            {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [7]}},
        ]
    },
}


def test_every_index_gets_a_pod() -> None:
    world = World(completions=3, parallelism=2).settle()
    assert [pod["metadata"]["annotations"][INDEX] for pod in world.pods] == ["0", "1"]
    assert world.status["active"] == 2
    assert world.status["ready"] == 0
    assert world.status["startTime"] == timestamp(T0)
    world.run().settle()
    assert world.status["ready"] == 2
    world.end(world.pod(0), 0).settle()
    assert world.status["completedIndexes"] == "0"
    assert sorted(pod["metadata"]["annotations"][INDEX] for pod in world.pods if _alive(pod)) == ["1", "2"]


def test_complete_comes_after_success_criteria_met_and_after_the_finalizers() -> None:
    world = World().settle()
    for index in (0, 1):
        world.end(world.pod(index), 0)
    world.step()
    assert world.conditions == [("SuccessCriteriaMet", "True", "CompletionsReached")]
    assert "completionTime" not in world.status
    world.settle()
    assert world.conditions[-1] == ("Complete", "True", "CompletionsReached")
    assert world.status["succeeded"] == 2
    assert world.status["completedIndexes"] == "0,1"
    assert world.status["completionTime"] == timestamp(T0)
    assert all(FINALIZER not in pod["metadata"]["finalizers"] for pod in world.pods)
    assert "active" not in world.status
    assert world.reasons == ["Completed"]


def test_one_failure_fails_the_gang_but_failed_waits_for_the_other_pods() -> None:
    world = World(**GANG).settle().run()
    world.end(world.pod(1), 1).settle()
    assert world.conditions == [("FailureTarget", "True", "PodFailurePolicy")]
    assert world.status["terminating"] == 1
    assert all(FINALIZER not in pod["metadata"]["finalizers"] for pod in world.pods)
    assert "active" not in world.status
    message = world.status["conditions"][0]["message"]
    assert message == "Container main for pod ns/j-2 failed with exit code 1 matching FailJob rule at index 1"
    world.kill_terminating().settle()
    assert world.conditions[-1] == ("Failed", "True", "PodFailurePolicy")
    assert world.status["terminating"] == 0
    assert world.status["failed"] == 2
    assert world.reasons == ["PodFailurePolicy"]
    assert [pod["metadata"]["uid"] for pod in world.pods] == ["pod-2"]


def test_a_disrupted_pod_is_replaced_once_it_has_ended_and_counts_for_nothing() -> None:
    world = World(**GANG).settle().run()
    pod = world.pod(0)
    pod["metadata"]["deletionTimestamp"] = timestamp(T0)
    world.settle()
    assert world.made == 2
    assert world.status["terminating"] == 1
    world.end(pod, 143, conditions=[{"type": "DisruptionTarget", "status": "True"}]).settle()
    assert world.made == 3
    assert "failed" not in world.status
    assert [kind for kind, *_ in world.conditions] == []


def test_backoff_limit() -> None:
    world = World(backoffLimit=1, completions=1, parallelism=1).settle()
    world.end(world.pod(0), 1).settle()
    assert (world.made, world.status["failed"]) == (1, 1)
    assert world.step().requeue_after == 10
    world.now += timedelta(seconds=11)
    world.settle()
    assert world.made == 2
    world.end(world.pod(0), 1).settle()
    assert world.conditions == [
        ("FailureTarget", "True", "BackoffLimitExceeded"),
        ("Failed", "True", "BackoffLimitExceeded"),
    ]
    assert world.status["failed"] == 2


@pytest.mark.parametrize(("failures", "wait"), [(1, 10), (2, 20), (3, 40), (9, 600)])
def test_replacements_wait_longer_each_time(failures: int, wait: int) -> None:
    world = World(backoffLimit=20, completions=1, parallelism=1).settle()
    for _ in range(failures):
        world.end(world.pod(0), 1).settle()
        delay = world.step().requeue_after
        world.now += timedelta(seconds=delay or 0)
        world.settle()
    assert delay == wait


def test_a_pod_that_was_deleted_after_it_was_counted_is_counted_once() -> None:
    world = World(backoffLimit=3, completions=1, parallelism=1).settle()
    pod = world.pod(0)
    world.end(pod, 1)
    world.step()
    assert world.status["uncountedTerminatedPods"] == {"failed": ["pod-1"]}
    world.pods.remove(pod)
    world.step()
    world.step()
    assert world.status["failed"] == 1
    assert world.status["uncountedTerminatedPods"] == {}


def test_suspend_and_resume() -> None:
    world = World(suspend=True, activeDeadlineSeconds=60).settle()
    assert world.conditions == [("Suspended", "True", "JobSuspended")]
    assert "startTime" not in world.status
    world.now += timedelta(hours=1)
    world.job["spec"]["suspend"] = False
    plan = world.step()
    assert world.conditions == [("Suspended", "False", "JobResumed")]
    assert world.status["startTime"] == timestamp(world.now)
    assert plan.requeue_after == 60
    assert len(world.pods) == 2
    world.run().job["spec"]["suspend"] = True
    world.settle()
    assert world.status["terminating"] == 2
    assert "active" not in world.status
    world.kill_terminating().settle()
    assert world.pods == []
    assert world.conditions == [("Suspended", "True", "JobSuspended")]
    assert "startTime" not in world.status
    world.now += timedelta(hours=1)
    world.job["spec"]["suspend"] = False
    world.settle()
    assert len(world.pods) == 2
    assert "failed" not in world.status
    assert world.reasons == ["Suspended", "Resumed", "Suspended", "Resumed"]


def test_active_deadline() -> None:
    world = World(activeDeadlineSeconds=60).settle().run()
    assert world.step().requeue_after == 60
    world.now += timedelta(seconds=60)
    world.settle()
    assert world.conditions == [("FailureTarget", "True", "DeadlineExceeded")]
    world.kill_terminating().settle()
    assert world.conditions[-1] == ("Failed", "True", "DeadlineExceeded")


def test_ttl_after_finished() -> None:
    world = World(ttlSecondsAfterFinished=30, completions=1, parallelism=1).settle()
    world.end(world.pod(0), 0).settle()
    assert world.step().requeue_after == 30
    assert not world.deleted
    world.now += timedelta(seconds=30)
    world.step()
    assert world.deleted


def test_a_job_that_is_deleted_lets_its_pods_go() -> None:
    world = World().settle().run()
    world.job["metadata"]["deletionTimestamp"] = timestamp(T0)
    plan = world.step()
    assert len(plan.release) == 2
    assert (plan.create, plan.delete, plan.status) == ((), (), None)


def test_fewer_pods_when_parallelism_shrinks_the_highest_index_first() -> None:
    world = World(completions=4, parallelism=3).settle().run()
    world.job["spec"]["parallelism"] = 1
    plan = world.step()
    assert [pod["metadata"]["annotations"][INDEX] for pod in plan.delete] == ["1", "2"]


def test_nothing_to_do_is_an_empty_plan() -> None:
    world = World().settle().run().settle()
    assert world.step() == Plan()


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"completionMode": "NonIndexed"}, "completionMode"),
        ({"backoffLimitPerIndex": 1}, "backoffLimitPerIndex"),
        ({"successPolicy": {"rules": []}}, "successPolicy"),
    ],
)
def test_what_is_not_supported_is_said(spec: Obj, named: str) -> None:
    plan = sync(make_job(**spec), [], T0)
    assert [notice.reason for notice in plan.notices] == ["Unsupported"]
    assert named in plan.notices[0].message
    assert plan.create == ()


@pytest.mark.parametrize(("text", "indexes"), [("", []), ("3", [3]), ("0,1", [0, 1]), ("0,2-4,9", [0, 2, 3, 4, 9])])
def test_indexes(text: str, indexes: list[int]) -> None:
    assert parse_indexes(text) == set(indexes)
    assert format_indexes(indexes) == text


def test_pods_are_made_as_the_job_controller_makes_them() -> None:
    job = make_job()
    job["metadata"]["name"] = "n" * 63
    pod = make_pod(job, 11)
    assert pod["metadata"]["generateName"] == "n" * 54 + "-11-"
    assert pod["metadata"]["labels"] == {
        "app": "x",
        "batch.kubernetes.io/controller-uid": "job-uid",
        "controller-uid": "job-uid",
        "batch.kubernetes.io/job-name": "n" * 63,
        "job-name": "n" * 63,
        INDEX: "11",
    }
    assert pod["metadata"]["ownerReferences"][0]["controller"] is True
    assert pod["spec"]["containers"][0]["env"][0]["name"] == "JOB_COMPLETION_INDEX"
    assert "env" not in job["spec"]["template"]["spec"]["containers"][0]


def test_seconds_without_end_are_no_error() -> None:
    world = World(activeDeadlineSeconds=2**53, ttlSecondsAfterFinished=2**53).settle().run()
    assert not world.deleted
    assert "FailureTarget" not in [c["type"] for c in world.job["status"].get("conditions", ())]
