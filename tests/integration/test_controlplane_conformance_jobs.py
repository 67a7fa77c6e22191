"""What gangs rely on in the Job controller. The same tests pass on the sandbox's and on a real one.

No node runs these pods (their scheduler is "nobody"): the test reports their states, as a kubelet would.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from support.api import Api, Object
from support.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(90)]

INDEX = "batch.kubernetes.io/job-completion-index"
CONTROLLER_UID = "batch.kubernetes.io/controller-uid"
JOB_NAME = "batch.kubernetes.io/job-name"

# As the operator writes them: any pod's end is the gang's, and a disruption is told apart.
GANG: Object = {
    "completionMode": "Indexed",
    "completions": 2,
    "parallelism": 2,
    "backoffLimit": 0,
    "podReplacementPolicy": "Failed",
}


@dataclass(frozen=True)
class Jobs:
    api: Api
    namespace: str

    def path(self, name: str = "j", subresource: str = "") -> str:
        parts = [f"/apis/batch/v1/namespaces/{self.namespace}/jobs", name, subresource]
        return "/".join(part for part in parts if part)

    def body(self, **spec: Any) -> Object:
        pod = {
            "restartPolicy": "Never",
            "schedulerName": "nobody",
            "subdomain": "j",
            "containers": [{"name": "main", "image": "example.com/image:1"}],
        }
        template = {"metadata": {"labels": {"ours": "yes"}}, "spec": pod}
        return {"metadata": {"name": "j"}, "spec": {**GANG, "template": template, **spec}}

    async def make(self, **spec: Any) -> Object:
        made: Object = (await self.api.create(self.path(""), self.body(**spec))).must(201)
        return made

    async def get(self) -> Object:
        job: Object = (await self.api.get(self.path())).must(200)
        return job

    async def pods(self) -> list[Object]:
        """Those that no one has asked to go, by index."""
        pods = await self.api.items(f"/api/v1/namespaces/{self.namespace}/pods", labelSelector=f"{JOB_NAME}=j")
        living = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        return sorted(living, key=lambda pod: int(pod["metadata"]["annotations"][INDEX]))

    async def running_pods(self, count: int) -> list[Object]:
        return await eventually(self.pods, f"{count} pods", until=lambda pods: len(pods) == count)

    async def report(self, pod: Object, phase: str, **status: Any) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/status"
        (await self.api.patch(path, {"status": {"phase": phase, **status}}, "strategic")).must(200)

    async def exit(self, pod: Object, code: int, **status: Any) -> None:
        """The pod's only container ended with `code`."""
        terminated = {"exitCode": code, "reason": "Error" if code else "Completed"}
        state = {"name": "main", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
        containers = [{**state, "state": {"terminated": terminated}}]
        await self.report(pod, "Failed" if code else "Succeeded", containerStatuses=containers, **status)

    async def until(self, what: str, accept: Callable[[Object], object], timeout: float = 20.0) -> Object:
        return await eventually(self.get, what, until=accept, timeout=timeout)

    async def condition(self, kind: str, reason: str | None = None, timeout: float = 20.0) -> Object:
        """The job, once it has the condition."""

        def accept(job: Object) -> bool:
            found = conditions(job).get(kind, {"status": "False"})
            return found["status"] == "True" and reason in (None, found.get("reason"))

        return await self.until(f"condition {kind}, {reason}", accept, timeout)


def conditions(job: Object) -> dict[str, Object]:
    return {condition["type"]: condition for condition in job["status"].get("conditions") or []}


def indexes(pods: list[Object]) -> list[str]:
    return [pod["metadata"]["annotations"][INDEX] for pod in pods]


@pytest.fixture
def jobs(api: Api, namespace: str) -> Jobs:
    return Jobs(api, namespace)


async def test_a_pod_knows_its_index_its_host_and_its_job(jobs: Jobs) -> None:
    job = await jobs.make()
    for index, pod in enumerate(await jobs.running_pods(2)):
        metadata, spec = pod["metadata"], pod["spec"]
        assert metadata["name"].startswith(f"j-{index}-")
        assert metadata["annotations"][INDEX] == str(index)
        assert metadata["labels"] == {
            "ours": "yes",
            INDEX: str(index),
            CONTROLLER_UID: job["metadata"]["uid"],
            JOB_NAME: "j",
            "controller-uid": job["metadata"]["uid"],
            "job-name": "j",
        }
        [owner] = metadata["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "j", job["metadata"]["uid"])
        assert owner["controller"] is True
        assert (spec["hostname"], spec["subdomain"]) == (f"j-{index}", "j")
        [variable] = [e for e in spec["containers"][0]["env"] if e["name"] == "JOB_COMPLETION_INDEX"]
        assert variable["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.labels['{INDEX}']"


async def test_what_a_job_leaves_out(jobs: Jobs) -> None:
    body = jobs.body()
    body["spec"] = {"template": body["spec"]["template"]}
    spec = (await jobs.api.create(jobs.path(""), body)).must(201)["spec"]
    wanted = {"backoffLimit": 6, "completionMode": "NonIndexed", "completions": 1, "parallelism": 1, "suspend": False}
    assert {key: spec.get(key) for key in wanted} == wanted
    assert spec["podReplacementPolicy"] == "TerminatingOrFailed"
    assert list(spec["selector"]["matchLabels"]) == [CONTROLLER_UID]


async def test_it_completes_when_every_index_has(jobs: Jobs) -> None:
    await jobs.make(completions=3)
    first = await jobs.running_pods(2)
    assert indexes(first) == ["0", "1"]
    job = await jobs.until("two active pods", lambda job: job["status"].get("active") == 2)
    assert job["status"]["startTime"]
    for pod in first:
        ready = [{"type": "Ready", "status": "True"}]
        await jobs.report(pod, "Running", conditions=ready)
    await jobs.until("two ready pods", lambda job: job["status"].get("ready") == 2)

    await jobs.exit(first[0], 0)
    await jobs.until("one succeeded", lambda job: job["status"].get("succeeded") == 1)
    last = await eventually(jobs.pods, "the third index", until=lambda pods: "2" in indexes(pods))
    await jobs.exit(first[1], 0)
    await jobs.exit(last[-1], 0)
    job = await jobs.condition("Complete")
    status = job["status"]
    assert (status["succeeded"], status["completedIndexes"]) == (3, "0-2")
    assert status.get("active", 0) == 0
    assert status["completionTime"]
    assert "Failed" not in conditions(job)
    assert len(await jobs.pods()) == 3, "finished pods stay until the job goes"


async def test_suspended_it_has_no_pods(jobs: Jobs) -> None:
    await jobs.make(suspend=True)
    job = await jobs.condition("Suspended")
    assert "startTime" not in job["status"]
    assert await jobs.pods() == []

    (await jobs.api.patch(jobs.path(), {"spec": {"suspend": False}})).must(200)
    await jobs.running_pods(2)
    job = await jobs.until("resumption", lambda job: conditions(job)["Suspended"]["status"] == "False")
    assert job["status"]["startTime"]

    (await jobs.api.patch(jobs.path(), {"spec": {"suspend": True}})).must(200)
    await jobs.running_pods(0)
    job = await jobs.condition("Suspended", "JobSuspended")
    assert not job["status"].get("failed")


async def test_one_failure_is_the_gangs(jobs: Jobs) -> None:
    await jobs.make()
    pods = await jobs.running_pods(2)
    await jobs.report(pods[0], "Running")
    await jobs.exit(pods[1], 1)
    job = await jobs.condition("Failed", "BackoffLimitExceeded")
    assert conditions(job)["FailureTarget"]["status"] == "True"
    left = await eventually(jobs.pods, "end of the other pod", until=lambda pods: indexes(pods) == ["1"])
    assert left[0]["status"]["phase"] == "Failed"
    assert job["status"].get("active", 0) == 0
    assert job["status"]["failed"] >= 1
    assert "completionTime" not in job["status"]


async def test_a_failed_index_is_tried_again_within_the_limit(jobs: Jobs) -> None:
    await jobs.make(backoffLimit=1, completions=1, parallelism=1)
    [first] = await jobs.running_pods(1)
    await jobs.exit(first, 1)
    pods = await eventually(jobs.pods, "another pod", until=lambda pods: len(pods) == 2, timeout=30)
    assert indexes(pods) == ["0", "0"]
    [second] = [pod for pod in pods if pod["metadata"]["uid"] != first["metadata"]["uid"]]
    await jobs.exit(second, 0)
    job = await jobs.condition("Complete")
    assert (job["status"]["succeeded"], job["status"]["failed"]) == (1, 1)


async def test_a_pod_that_is_deleted_before_it_ran_has_failed(jobs: Jobs) -> None:
    """Under `podReplacementPolicy: Failed` somebody has to say so: in a cluster it is the pod garbage collector."""
    await jobs.make()
    pods = await jobs.running_pods(2)
    path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pods[0]['metadata']['name']}"
    (await jobs.api.delete(path)).must(200)
    await jobs.condition("Failed", "BackoffLimitExceeded", timeout=45)


DISRUPTED = [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]


def on_exit(action: str, operator: str, *values: int) -> Object:
    return {"action": action, "onExitCodes": {"containerName": "main", "operator": operator, "values": list(values)}}


def on_disruption(action: str) -> Object:
    return {"action": action, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


@pytest.mark.parametrize(
    ("rules", "limit", "code", "disrupted", "reason"),
    [
        ([on_exit("FailJob", "In", 42)], 6, 42, False, "PodFailurePolicy"),
        ([on_exit("FailJob", "NotIn", 42)], 6, 43, False, "PodFailurePolicy"),
        ([on_exit("FailJob", "In", 42)], 0, 43, False, "BackoffLimitExceeded"),
        ([on_disruption("FailJob")], 6, 143, True, "PodFailurePolicy"),
        ([on_exit("Count", "In", 42), on_exit("FailJob", "In", 42)], 0, 42, False, "BackoffLimitExceeded"),
        ([on_disruption("Ignore")], 0, 143, True, None),
    ],
    ids=["code listed", "code not excepted", "no rule", "disruption", "first rule wins", "ignored"],
)
async def test_the_pod_failure_policy_decides(
    jobs: Jobs, rules: list[Object], limit: int, code: int, disrupted: bool, reason: str | None
) -> None:
    rules = [{"onPodConditions": [], **rule} if "onExitCodes" not in rule else rule for rule in rules]
    await jobs.make(backoffLimit=limit, podFailurePolicy={"rules": rules})
    pods = await jobs.running_pods(2)
    await jobs.report(pods[0], "Running")
    await jobs.exit(pods[1], code, **({"conditions": DISRUPTED} if disrupted else {}))
    if reason is None:

        def replaced(now: list[Object]) -> bool:
            living = [pod for pod in now if pod["status"]["phase"] == "Pending"]
            return indexes(living) == ["1"]

        await eventually(jobs.pods, "another pod for the index", until=replaced, timeout=30)
        job = await jobs.get()
        assert not job["status"].get("failed")
        assert "Failed" not in conditions(job)
        return
    job = await jobs.condition("Failed", reason)
    assert conditions(job)["FailureTarget"]["reason"] == reason
    message = conditions(job)["Failed"]["message"]
    if reason == "PodFailurePolicy" and not disrupted:
        assert f"exit code {code}" in message
        assert "Container main" in message
    elif reason == "PodFailurePolicy":
        assert "DisruptionTarget" in message
    await eventually(jobs.pods, "end of the other pod", until=lambda pods: indexes(pods) == ["1"])


async def test_failed_only_once_its_pods_are_gone(jobs: Jobs) -> None:
    await jobs.make(podFailurePolicy={"rules": [on_exit("FailJob", "In", 42)]})
    pods = await jobs.running_pods(2)
    held = f"/api/v1/namespaces/{jobs.namespace}/pods/{pods[0]['metadata']['name']}"
    finalizers = [*pods[0]["metadata"]["finalizers"], "example.com/hold"]
    (await jobs.api.patch(held, {"metadata": {"finalizers": finalizers}})).must(200)
    await jobs.report(pods[0], "Running")
    await jobs.exit(pods[1], 42)
    job = await jobs.condition("FailureTarget", "PodFailurePolicy")
    job = await jobs.until("a terminating pod", lambda job: job["status"].get("terminating") == 1)
    assert "Failed" not in conditions(job)
    (await jobs.api.patch(held, [{"op": "remove", "path": "/metadata/finalizers"}], "json")).must(200)
    await jobs.condition("Failed", "PodFailurePolicy")


async def test_a_deadline_ends_it(jobs: Jobs) -> None:
    await jobs.make(activeDeadlineSeconds=1)
    job = await jobs.condition("Failed", "DeadlineExceeded")
    await jobs.running_pods(0)
    assert job["status"].get("active", 0) == 0


async def test_it_goes_when_its_time_is_over(jobs: Jobs) -> None:
    await jobs.make(completions=1, parallelism=1, ttlSecondsAfterFinished=1)
    [pod] = await jobs.running_pods(1)
    await jobs.exit(pod, 0)
    await eventually(
        lambda: jobs.api.get(jobs.path()), "end of the job", until=lambda answer: answer.status == 404, timeout=20
    )
    await jobs.running_pods(0)


@pytest.mark.parametrize("policy", ["Background", "Foreground"])
async def test_its_pods_go_with_it(jobs: Jobs, policy: str) -> None:
    job = await jobs.make()
    await jobs.running_pods(2)
    options = {"propagationPolicy": policy, "preconditions": {"uid": job["metadata"]["uid"]}}
    (await jobs.api.delete(jobs.path(), options)).must(200)
    await jobs.running_pods(0)
    await eventually(lambda: jobs.api.get(jobs.path()), "end of the job", until=lambda answer: answer.status == 404)


async def test_only_the_controllers_world_moves_the_status(jobs: Jobs) -> None:
    made = await jobs.make(suspend=True)
    assert made["metadata"]["generation"] == 1
    change = {"spec": {"parallelism": 1}, "status": {"active": 9}}
    patched = (await jobs.api.patch(jobs.path(), change)).must(200)
    assert patched["metadata"]["generation"] == 2
    assert patched["status"].get("active", 0) == 0


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"completions": None}, "spec.completions"),
        ({"parallelism": -1}, "spec.parallelism"),
        ({"backoffLimit": -1}, "spec.backoffLimit"),
        ({"completionMode": "Sideways"}, "spec.completionMode"),
        ({"activeDeadlineSeconds": -1}, "spec.activeDeadlineSeconds"),
        ({"podFailurePolicy": {"rules": [on_exit("FailJob", "In")]}}, "spec.podFailurePolicy.rules[0]"),
        ({"podFailurePolicy": {"rules": [on_exit("FailJob", "In", 0)]}}, "spec.podFailurePolicy.rules[0]"),
        (
            {"podFailurePolicy": {"rules": []}, "podReplacementPolicy": "TerminatingOrFailed"},
            "spec.podReplacementPolicy",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_bad_job_is_refused(jobs: Jobs, spec: Object, field: str) -> None:
    assert field in (await jobs.api.create(jobs.path(""), jobs.body(**spec))).refused(422, "Invalid")


async def test_a_pods_template_needs_an_end(jobs: Jobs) -> None:
    body = jobs.body()
    body["spec"]["template"]["spec"]["restartPolicy"] = "Always"
    assert "restartPolicy" in (await jobs.api.create(jobs.path(""), body)).refused(422, "Invalid")


async def test_what_pods_are_made_from_stays(jobs: Jobs) -> None:
    await jobs.make()
    await jobs.running_pods(2)
    container = {"name": "main", "image": "example.com/image:2"}
    for change in (
        {"template": {"spec": {"containers": [container]}}},
        {"completionMode": "NonIndexed"},
        {"podFailurePolicy": {"rules": [on_disruption("Ignore")]}},
        {"selector": {"matchLabels": {"a": "b"}}},
    ):
        (await jobs.api.patch(jobs.path(), {"spec": change})).refused(422, "Invalid")
