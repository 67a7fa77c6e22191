"""The operator with the rights that the chart grants it and no others: all of them are needed, and none is missing."""

import json
import secrets
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from finetune_api.failures import EXIT_CODES, Reason, TerminationMessage
from finetune_api.profile import DEFAULT_ANNOTATION
from finetune_operator.plan import KEEP_ENDED
from support import rights
from support.admitting import PATH, paths_file
from support.api import Api, Object
from support.charting import render
from support.manifests import job_manifest
from support.operating import GROUP, Operator, Scene
from support.reporting import STATUS, Post, Reporting, install_crds
from support.rights import Recorder, Right
from support.s3 import unused_port
from support.waiting import eventually
from support.world import PREPARED, make_profile

if TYPE_CHECKING:
    from finetune_sandbox.up import Sandbox

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@asynccontextmanager
async def installed(api: Api, namespace: str, release: str) -> AsyncIterator[tuple[list[Object], str]]:
    """What the chart grants for one namespace, and a token of the account that has it."""
    manifests = render({"watchNamespaces": [namespace]}, release, namespace)
    roles = rights.of_account(manifests, release)
    accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    (await api.create(accounts, {"metadata": {"name": release}})).must(201)
    await rights.apply(api, roles)
    try:
        yield roles, await rights.token_of(api, namespace, release)
    finally:
        await rights.remove(api, roles)


@asynccontextmanager
async def profile(api: Api, name: str) -> AsyncIterator[None]:
    """One that jobs get by default, and that has all that makes an object."""
    made = make_profile(name, default=False, networkPolicy=True)
    del made["metadata"]["resourceVersion"]
    made["metadata"]["annotations"] = {DEFAULT_ANNOTATION: "true"}
    (await api.create(f"{GROUP}/finetuneprofiles", made)).must(201)
    try:
        yield
    finally:
        await api.delete(f"{GROUP}/finetuneprofiles/{name}")


async def live(scene: Scene, progress: int) -> None:
    """All that happens to jobs: attempts, suspensions, progress, an end, and that they are taken away."""
    job = (await scene.api.create(scene.job_path(""), manifest())).must(201)
    await scene.prepared()
    await scene.run("j-0")
    await scene.reaches("Running")
    await report(scene, job, progress)
    broke = TerminationMessage(reason=Reason.HUNG, message="it broke", rank=0)
    # The test of NetworkPolicies runs beside it, in the same namespace.
    await eventually(scene.jobs, "nettest", until=lambda jobs: any(name.startswith("nettest-") for name in jobs))
    for number in range(2):
        await scene.policy(suspend=True)
        await scene.reaches("Suspended")
        await eventually(scene.jobs, "the gang to go", until=partial(_lacks, f"j-{number}"), timeout=40)
        await scene.policy(suspend=False)
        await scene.run(f"j-{number + 1}")
        await scene.reaches("Running")
    last = await preempted(scene, 2)
    await scene.end(f"j-{last}", message=broke, code=EXIT_CODES[Reason.HUNG])
    await scene.reaches("Failed")
    await scene.policy(ttlSecondsAfterFinished=0)

    async def gone() -> bool:
        return (await scene.api.get(scene.job_path())).status == 404

    await eventually(gone, "the job to go", timeout=40)
    async with rights.kueue(scene.api):
        await queued(scene)


async def preempted(scene: Scene, number: int) -> int:
    """Again and again, until a gang that ended is one too many; the number of the one that runs then."""
    signal = TerminationMessage(reason=Reason.PREEMPTED, message="SIGTERM", rank=0)
    for past in range(number, number + KEEP_ENDED + 1):
        await scene.end(f"j-{past}", message=signal, code=EXIT_CODES[Reason.PREEMPTED])
        await scene.run(f"j-{past + 1}")
        await scene.reaches("Running")
    await eventually(scene.jobs, "the first of them to go", until=partial(_lacks, f"j-{number}"), timeout=40)
    return number + KEEP_ENDED + 1


async def queued(scene: Scene) -> None:
    """A gang that waits for Kueue, whose Workload is looked at."""
    job = manifest()
    job["metadata"]["name"], job["spec"]["queue"] = "q", {"name": "team"}
    (await scene.api.create(scene.job_path(""), job)).must(201)
    await scene.reaches("Preparing", "q")
    await scene.end("q-prepare", message=TerminationMessage(prepared=PREPARED))
    await scene.reaches("Queued", "q")

    async def looked() -> bool:
        # Whoever touches the job is heard at once; else the queue is asked once a minute.
        note = {"metadata": {"annotations": {"test/look": secrets.token_hex(4)}}}
        (await scene.api.patch(scene.job_path("q"), note)).must(200)
        assert isinstance(scene.proxy, Recorder)
        return Right("kueue.x-k8s.io", "workloads", "list") in scene.proxy.used

    await eventually(looked, "a look at the Workload", timeout=30, interval=0.5)


def _lacks(name: str, jobs: list[str]) -> bool:
    return name not in jobs


def manifest() -> Object:
    made = job_manifest("j", runPolicy={"maxAttempts": 1}, credentials={"secretRef": {"name": "s3"}})
    del made["metadata"]["namespace"]
    return made


async def report(scene: Scene, job: Object, port: int) -> None:
    """As the trainer's pod does it."""
    reporting = Reporting(scene.api, scene.namespace, "j", job["metadata"]["uid"])
    [pod] = await scene.pods("j-0")
    post = Post(port, scene.operator.directory / "tls" / "ca.crt")
    (await post(reporting.path, await reporting.token(pod), STATUS)).must(200)
    await eventually(reporting.trainer_status, "progress in the status")


async def review(folder: Path, port: int, job: Object) -> None:
    """As the API server asks the webhook."""
    request = {
        "uid": "u",
        "kind": {"kind": "FineTuneJob"},
        "operation": "CREATE",
        "namespace": job["metadata"]["namespace"],
        "name": "j",
        "userInfo": {"username": "tenant", "groups": ["system:authenticated"]},
        "object": job,
    }
    body = json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})
    trust = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    url = f"https://127.0.0.1:{port}{PATH}"
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session,
        session.post(url, data=body) as response,
    ):
        answer = await response.json()
    assert answer["response"]["allowed"] is False, answer
    assert "tenant" in answer["response"]["status"]["message"], answer


async def test_the_chart_grants_what_a_run_needs_and_nothing_else(
    cluster: "Sandbox", api: Api, namespace: str, tmp_path: Path
) -> None:
    await install_crds(api)
    release = f"ft-{secrets.token_hex(4)}"
    ports = {name: unused_port() for name in ("PROGRESS_PORT", "ADMISSION_PORT")}
    async with (
        profile(api, release),
        installed(api, namespace, release) as (roles, token),
        Recorder.running(cluster.kubeconfig) as proxy,
    ):
        assert isinstance(proxy, Recorder)
        proxy.headers = {"Authorization": f"Bearer {token}"}
        operator = Operator(tmp_path, proxy, namespace)
        scene = Scene(api, namespace, release, operator, proxy)
        settings = {name: str(port) for name, port in ports.items()}
        settings["ADMISSION_PATHS"] = str(paths_file(tmp_path / "tls"))
        await operator.start(LEASE=f"{namespace}/{release}", LEASE_SECONDS="1", RESYNC_SECONDS="2", **settings)
        try:
            await live(scene, ports["PROGRESS_PORT"])
            job = manifest()
            job["metadata"]["namespace"], job["spec"]["profile"] = namespace, release
            await review(tmp_path / "tls", ports["ADMISSION_PORT"], job)
        finally:
            await operator.stop()
    assert proxy.refused == set(), operator.log.read_text()[-3000:]
    assert rights.granted(roles) - proxy.used == set(), "granted, and never needed"
    assert proxy.used - rights.granted(roles) == set()


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["a", "b"]}])
def test_no_right_is_on_secrets_or_on_everything(values: Object) -> None:
    found = rights.granted(rights.of_account(render(values), "ft"))
    assert found
    assert [right for right in found if right.resource.startswith("secrets") or "*" in right] == []
    # Who may write these could write themselves more.
    dangerous = {"roles", "rolebindings", "clusterroles", "clusterrolebindings", "serviceaccounts", "pods/exec"}
    assert [right for right in found if right.resource in dangerous or right.verb in ("escalate", "bind")] == []
    assert {right.verb for right in found if right.resource == "pods"} <= {"get", "list", "watch"}


def test_named_namespaces_alone_are_bound() -> None:
    roles = rights.of_account(render({"watchNamespaces": ["a", "b"]}), "ft")
    wide = {m["roleRef"]["name"] for m in roles if m["kind"] == "ClusterRoleBinding"}
    everywhere = rights.granted([m for m in roles if m["metadata"]["name"] in wide])
    profiles = {"finetuneprofiles", "finetuneprofiles/status"}
    assert {right.resource for right in everywhere} == profiles | {"tokenreviews", "subjectaccessreviews"}


@pytest.mark.parametrize(
    ("method", "path", "watches", "right"),
    [
        ("GET", "/api/v1/namespaces/a/pods", False, ("", "pods", "list")),
        ("GET", "/api/v1/namespaces/a/pods", True, ("", "pods", "watch")),
        ("GET", "/api/v1/namespaces/a/pods/b", False, ("", "pods", "get")),
        ("GET", "/api/v1/namespaces/a/pods/b/log", False, ("", "pods/log", "get")),
        ("GET", "/api/v1/namespaces/a", False, ("", "namespaces", "get")),
        ("POST", "/apis/batch/v1/namespaces/a/jobs", False, ("batch", "jobs", "create")),
        (
            "PATCH",
            "/apis/finetune.dev/v1alpha1/namespaces/a/finetunejobs/b/status",
            False,
            ("finetune.dev", "finetunejobs/status", "patch"),
        ),
        (
            "PUT",
            "/apis/coordination.k8s.io/v1/namespaces/a/leases/b",
            False,
            ("coordination.k8s.io", "leases", "update"),
        ),
    ],
)
def test_a_request_is_read_as_the_right_that_it_takes(method: str, path: str, watches: bool, right: Right) -> None:
    assert rights.asked_for(method, path, watches) == right


def test_what_is_no_resource_takes_none() -> None:
    assert rights.asked_for("GET", "/version", False) is None
    assert rights.asked_for("GET", "/apis/finetune.dev/v1alpha1", False) is None
