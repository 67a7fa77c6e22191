"""The progress server over TLS, before a real API server: real tokens, real reviews, real pods. Every refusal, and the
callback with which a stock Trainer reports."""

import asyncio
import json
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.cluster import ApiError, KubeCluster
from finetune_operator.progress import ProgressServer
from finetune_sandbox.up import Sandbox
from support.api import Api, Object
from support.reporting import Attempt, Post, Reporting, install_crds, kube_cluster, progress_server
from support.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


@pytest.fixture
async def kube(cluster: Sandbox) -> AsyncIterator[KubeCluster]:
    async with kube_cluster(cluster.kubeconfig) as connected:
        yield connected


@pytest.fixture
async def served(kube: KubeCluster, tmp_path: Path) -> AsyncIterator[tuple[ProgressServer, Post]]:
    async with progress_server(kube, tmp_path) as running:
        yield running


@pytest.fixture
async def post(served: tuple[ProgressServer, Post]) -> Post:
    return served[1]


@pytest.fixture
async def job(api: Api, namespace: str) -> Reporting:
    await install_crds(api)
    return await Reporting.create(api, namespace)


@pytest.fixture
async def attempt(job: Reporting) -> Attempt:
    """The attempt that runs."""
    attempt = await job.attempt(0)
    await job.set_status(attempts=[attempt.entry()])
    return attempt


@pytest.fixture
async def token(job: Reporting, attempt: Attempt) -> str:
    return await job.token(attempt.pod)


async def seen(job: Reporting, **expected: Any) -> Object:
    """status.trainerStatus, once it has these members."""
    return await eventually(
        job.trainer_status, f"{expected} in status.trainerStatus", until=lambda s: expected.items() <= s.items()
    )


async def test_reports_of_the_current_attempts_pod_become_its_trainer_status(
    job: Reporting, post: Post, token: str
) -> None:
    before = await job.status()
    answer = await post(job.path, token, {"trainerStatus": {"phase": "Loading", "foreign": {"ignored": True}}})
    assert answer.status == 200
    assert answer.body.keys() == {"headers"}  # {} and nothing else
    await seen(job, phase="Loading", attempt=0)
    metrics = [{"name": "loss", "value": "2.5"}, {"name": "lr", "value": "0.1"}]
    first = {"phase": "Training", "step": 10, "totalSteps": 100, "metrics": metrics}
    assert (await post(job.path, token, {"trainerStatus": first})).status == 200
    await seen(job, phase="Training", step=10, totalSteps=100, progressPercentage=10)
    checkpoint = {"uri": "s3://bucket/c/step-20", "step": 20, "time": "2026-01-01T00:00:00"}
    second = {"step": 20, "metrics": [{"name": "loss", "value": "NaN"}], "checkpoint": checkpoint}
    assert (await post(job.path, token, {"trainerStatus": second})).status == 200
    status = await seen(job, step=20, progressPercentage=20)
    assert status["metrics"] == [{"name": "loss", "value": "NaN"}, {"name": "lr", "value": "0.1"}]
    assert status["checkpoint"] == checkpoint | {"time": "2026-01-01T00:00:00Z"}
    assert status["estimatedRemainingSeconds"] >= 0
    assert (await post(job.path, token, {"trainerStatus": {"progressPercentage": 0}})).status == 200
    assert (await post(job.path, token, {"trainerStatus": {"progressPercentage": 100}})).status == 200
    await seen(job, progressPercentage=100)
    after = await job.status()
    del after["trainerStatus"]
    assert after == before  # nothing else was touched


async def test_the_next_attempt_leaves_nothing_of_the_last_one(job: Reporting, post: Post, attempt: Attempt) -> None:
    old = await job.token(attempt.pod)
    report = {
        "phase": "Training",
        "step": 50,
        "totalSteps": 100,
        "stage": "one",
        "metrics": [{"name": "x", "value": "1"}],
    }
    assert (await post(job.path, old, {"trainerStatus": report})).status == 200
    await seen(job, step=50)
    following = await job.attempt(1)
    await job.set_status(attempts=[attempt.entry(outcome="Retryable"), following.entry()])
    refused = await post(job.path, old, {"trainerStatus": {"step": 60}})
    assert "only pods of attempt 1 of" in refused.refused(403, "Forbidden")
    new = await job.token(following.pod)
    assert (await post(job.path, new, {"trainerStatus": {"progressPercentage": 0}})).status == 200
    status = await seen(job, attempt=1)
    assert status.keys() == {"attempt", "lastUpdatedTime", "metrics", "progressPercentage"}
    assert (status["metrics"], status["progressPercentage"]) == ([], 0)


async def test_tokens_that_do_not_open_it(job: Reporting, post: Post, attempt: Attempt, api: Api) -> None:
    other = await Reporting.create(api, job.namespace)
    assert "a bearer token is required" in (await post(job.path, None)).refused(401, "Unauthorized")
    basic = await post(job.path, None, headers={"Authorization": "Basic YTpi"})
    assert basic.refused(401, "Unauthorized")
    assert basic.body["headers"]["WWW-Authenticate"] == "Bearer"
    not_valid = [
        "nonsense",
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9.",
        await job.token(attempt.pod, ("another",)),
        await other.token(attempt.pod),  # for this pod, but to report on another job
    ]
    for token in not_valid:
        assert "is not valid for audience" in (await post(job.path, token)).refused(401, "Unauthorized")
    unbound = await post(job.path, await job.token(None))
    assert "bound to no pod" in unbound.refused(403, "Forbidden")
    assert await job.trainer_status() == {}


async def test_pods_that_may_not_report(job: Reporting, post: Post, attempt: Attempt, api: Api) -> None:
    prepare = await job.attempt(7, label="prepare")
    answer = await post(job.path, await job.token(prepare.pod))
    assert "is labelled as attempt prepare of" in answer.refused(403, "Forbidden")
    posing = await job.attempt(8, label="0")  # an older Job's pod, or somebody else's with the labels of this attempt
    answer = await post(job.path, await job.token(posing.pod))
    assert f"is not owned by Job {job.name}-0" in answer.refused(403, "Forbidden")
    token = await job.token(attempt.pod)
    assert (await post(job.path, token)).status == 200
    pod = f"/api/v1/namespaces/{job.namespace}/pods/{attempt.pod['metadata']['name']}"
    (await api.patch(f"{pod}/status", {"status": {"phase": "Failed"}})).must(200)
    assert "is finished (Failed)" in (await post(job.path, token)).refused(403, "Forbidden")


async def test_a_pod_that_is_gone_may_not_report(job: Reporting, post: Post, attempt: Attempt, api: Api) -> None:
    token = await job.token(attempt.pod)
    assert (await post(job.path, token)).status == 200
    pods = f"/api/v1/namespaces/{job.namespace}/pods"
    (await api.delete(f"/apis/batch/v1/namespaces/{job.namespace}/jobs/{job.name}-0", propagationPolicy="Orphan"))
    await api.patch(f"{pods}/{attempt.pod['metadata']['name']}", {"metadata": {"finalizers": None}})
    await api.delete(f"{pods}/{attempt.pod['metadata']['name']}", gracePeriodSeconds=0)
    # The token is known, and its pod is looked for all the same.
    answer = await eventually(lambda: post(job.path, token), "refusal", until=lambda answer: answer.status == 403)
    assert "does not exist any more" in answer.refused(403, "Forbidden")


async def test_jobs_that_take_no_reports(job: Reporting, post: Post, token: str, attempt: Attempt) -> None:
    missing = job.path.replace(job.name, "nobody")
    assert "not found" in (await post(missing, token)).refused(404, "NotFound")
    await job.set_status(attempts=[attempt.entry(outcome="Preempted")])
    assert "has no attempt that runs" in (await post(job.path, token)).refused(409, "Conflict")
    time = "2026-01-01T00:00:00Z"
    finished = {"type": "Failed", "status": "True", "reason": "RankFailed", "message": "", "lastTransitionTime": time}
    await job.set_status(attempts=[attempt.entry()], conditions=[finished])
    assert "is finished and takes no more progress" in (await post(job.path, token)).refused(409, "Conflict")


async def test_requests_that_are_none(job: Reporting, post: Post, token: str) -> None:
    for path in ("/", "/healthz", job.path + "/x", job.path.replace("/status", ""), job.path + "%2F", "/%ff"):
        (await post(path, token)).refused(404, "NotFound")
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        answer = await post(job.path, token, method=method)
        answer.refused(405, "MethodNotAllowed")
        assert answer.body["headers"]["Allow"] == "POST"
    for headers in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
        (await post(job.path, token, headers=headers)).refused(415, "UnsupportedMediaType")
    large = json.dumps({"trainerStatus": {}, "padding": "x" * 64 * 1024}).encode()
    assert "at most 65536 bytes" in (await post(job.path, token, data=large)).refused(413, "RequestEntityTooLarge")
    just_fits = json.dumps({"trainerStatus": {}, "padding": ""}).encode()
    just_fits = just_fits.replace(b'""', b'"' + b"x" * (64 * 1024 - len(just_fits)) + b'"')
    assert (await post(job.path, token, data=just_fits)).status == 200


INVALID: list[tuple[Any, str]] = [
    ({}, "trainerStatus: is required"),
    ([], ""),
    ({"trainerStatus": None}, "trainerStatus"),
    ({"trainerStatus": {"progressPercentage": 101}}, "trainerStatus.progressPercentage: found 101"),
    ({"trainerStatus": {"progressPercentage": "half"}}, "trainerStatus.progressPercentage: found 'half'"),
    ({"trainerStatus": {"step": -1}}, "trainerStatus.step: found -1"),
    ({"trainerStatus": {"step": 10**30}}, "trainerStatus.step: found a number of 100 bits"),
    ({"trainerStatus": {"phase": "Dreaming"}}, "trainerStatus.phase: found 'Dreaming'"),
    ({"trainerStatus": {"metrics": [{"name": "loss", "value": 1.0}]}}, "trainerStatus.metrics[0].value"),
    ({"trainerStatus": {"metrics": [{"name": "", "value": "1"}]}}, "trainerStatus.metrics[0].name"),
    ({"trainerStatus": {"metrics": [{"name": "m", "value": "1"}] * 65}}, "trainerStatus.metrics"),
    ({"trainerStatus": {"checkpoint": {"uri": "/tmp", "step": 1, "time": "2026-01-01T00:00:00Z"}}}, "checkpoint.uri"),
]


async def test_bodies_that_are_invalid(job: Reporting, post: Post, token: str) -> None:
    for body, words in INVALID:
        assert words in (await post(job.path, token, body)).refused(422, "Invalid")
    for data in (b"", b"{", b"\xff\xfe", b"null", b"[" * 60_000, b'{"trainerStatus": ' * 3000, b'"\\ud800"', b"NaN"):
        (await post(job.path, token, data=data)).refused(422, "Invalid")
    assert await job.trainer_status() == {}


def mutated(rng: random.Random) -> bytes:
    """A report in which some values are not what they should be, or some bytes not where they should be."""
    odd: list[Any] = [None, -1, 0, 7, 2**53, 2**63, 10**40, 1e308, 0.5, True, [], {}]
    odd += ["", "x", "é\u0000\u2028", "9" * 64, "2026-01-01"]
    names = ["progressPercentage", "estimatedRemainingSeconds", "metrics", "lastUpdatedTime", "phase", "stage", "step"]
    names += ["totalSteps", "attempt", "checkpoint"]
    status: Object = {name: rng.choice(odd) for name in rng.sample(names, rng.randint(0, 4))}
    if rng.random() < 0.5:
        words, values = ["current_step", "total_steps", "loss", "\u0001"], ["9" * 15, "1", "-inf"]
        status["metrics"] = [{"name": rng.choice(words), "value": rng.choice(values)} for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.3:
        times = ["2026-01-01T00:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", 0, -1, 1e11]
        status["checkpoint"] = {"uri": "s3://bucket/k", "step": rng.choice(odd), "time": rng.choice(times)}
    data = bytearray(json.dumps({"trainerStatus": status}).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


async def test_no_body_is_a_servers_error_and_what_is_taken_can_be_written(
    job: Reporting, served: tuple[ProgressServer, Post], token: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, post = served
    rng = random.Random(7)
    answers = [(await post(job.path, token, data=data)).status for data in (mutated(rng) for _ in range(250))]
    assert set(answers) == {200, 422}
    # What was taken reaches the job: the API server finds no fault with it.
    assert (
        await post(job.path, token, {"trainerStatus": {"progressPercentage": 100, "phase": "Publishing"}})
    ).status == 200
    await seen(job, progressPercentage=100, phase="Publishing")
    assert [record.message for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


async def test_too_many_reports_of_one_job_wait_and_others_do_not(
    kube: KubeCluster, api: Api, job: Reporting, token: str, tmp_path: Path
) -> None:
    other = await Reporting.create(api, job.namespace)
    others = await other.attempt(0)
    await other.set_status(attempts=[others.entry()])
    async with progress_server(kube, tmp_path, burst=2.0, reports_per_second=0.1) as (_, post):
        assert [(await post(job.path, token)).status for _ in range(2)] == [200, 200]
        answer = await post(job.path, token)
        assert "too many reports" in answer.refused(429, "TooManyRequests")
        assert 1 <= int(answer.body["headers"]["Retry-After"]) <= 10
        assert answer.body["details"] == {"retryAfterSeconds": int(answer.body["headers"]["Retry-After"])}
        assert (await post(other.path, await other.token(others.pod))).status == 200


async def test_many_reports_at_once_with_a_new_token_come_to_no_more(
    kube: KubeCluster, job: Reporting, token: str, tmp_path: Path
) -> None:
    async with progress_server(kube, tmp_path, burst=2.0, reports_per_second=0.01) as (_, post):
        answers = await asyncio.gather(*(post(job.path, token) for _ in range(12)))
        assert sorted(answer.status for answer in answers) == [200] * 2 + [429] * 10


async def test_strangers_cannot_use_up_what_the_job_may_report(
    kube: KubeCluster, job: Reporting, token: str, tmp_path: Path
) -> None:
    async with progress_server(kube, tmp_path, stranger_burst=3.0, strangers_per_second=0.01) as (_, post):
        assert (await post(job.path, token)).status == 200
        assert [(await post(job.path, f"guess-{n}")).status for n in range(4)] == [401, 401, 429, 429]
        assert (await post(job.path, token)).status == 200


async def test_a_write_that_fails_comes_again(
    kube: KubeCluster, job: Reporting, token: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Flaky:
        """The cluster, which fails to write at first."""

        failures = 2

        def __getattr__(self, name: str) -> Any:
            return getattr(kube, name)

        async def patch_trainer_status(self, *args: Any) -> bool:
            if self.failures:
                self.failures -= 1
                raise ApiError(500, "InternalError", "etcd is not at home")
            return await kube.patch_trainer_status(*args)

    async with progress_server(Flaky(), tmp_path) as (_, post):
        assert (await post(job.path, token, {"trainerStatus": {"step": 3}})).status == 200
        await seen(job, step=3)
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        f"progress is written again in {wait} s: 500 InternalError: etcd is not at home" for wait in (1, 2)
    ]


async def test_what_waits_is_written_when_the_server_goes(
    kube: KubeCluster, job: Reporting, token: str, tmp_path: Path
) -> None:
    async with progress_server(kube, tmp_path, write_interval=3600.0) as (_, post):
        for step in (1, 2, 3):
            assert (await post(job.path, token, {"trainerStatus": {"step": step}})).status == 200
    assert (await job.trainer_status())["step"] == 3


async def test_replicas_that_share_a_job_do_not_undo_each_other(
    kube: KubeCluster, job: Reporting, token: str, tmp_path: Path
) -> None:
    async with (
        progress_server(kube, tmp_path / "a", write_interval=0.0) as (_, one),
        progress_server(kube, tmp_path / "b", write_interval=0.0) as (_, two),
    ):
        for step in range(1, 11):
            body = {"trainerStatus": {"step": step, "totalSteps": 10, "metrics": [{"name": f"m{step}", "value": "1"}]}}
            assert (await (one if step % 2 else two)(job.path, token, body)).status == 200
            await seen(job, step=step)
    assert {metric["name"] for metric in (await job.trainer_status())["metrics"]} == {f"m{n}" for n in range(1, 11)}


async def test_an_api_server_that_is_down_is_not_the_trainers_fault(
    kube: KubeCluster, job: Reporting, token: str, tmp_path: Path
) -> None:
    class Down:
        async def get_job(self, namespace: str, name: str) -> Object | None:
            raise ApiError(0, "Unreachable", "connection refused")

    async with progress_server(Down(), tmp_path) as (_, post):
        answer = await post(job.path, token)
        assert "report again later" in answer.refused(503, "ServiceUnavailable")
        assert answer.body["headers"]["Retry-After"] == "5"


async def open_connection(post: Post) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context(cafile=post.ca)
    return await asyncio.open_connection("127.0.0.1", post.port, ssl=context)


@pytest.mark.parametrize("sent", [b"", b"POST /", b"POST / HTTP/1.1\r\nHost: a\r\nX-Slow: "])
async def test_whoever_dawdles_is_cut_off(kube: KubeCluster, tmp_path: Path, sent: bytes) -> None:
    async with progress_server(kube, tmp_path, connection_seconds=0.3) as (_, post):
        reader, writer = await open_connection(post)
        writer.write(sent)
        await writer.drain()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.transport.abort()


async def test_a_body_that_dribbles_in_is_cut_off(
    kube: KubeCluster, tmp_path: Path, job: Reporting, token: str
) -> None:
    async with progress_server(kube, tmp_path, connection_seconds=1.0) as (_, post):
        reader, writer = await open_connection(post)
        head = f"POST {job.path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
        writer.write(f"{head}Authorization: Bearer {token}\r\n\r\n{{".encode())
        await writer.drain()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.transport.abort()
        assert (await post(job.path, token)).status == 200


async def test_who_speaks_takes_the_place_of_who_says_nothing(kube: KubeCluster, tmp_path: Path) -> None:
    async with progress_server(kube, tmp_path, max_connections=3) as (_, post):
        held = [await open_connection(post) for _ in range(3)]
        assert (await post("/", None)).status == 404
        reader, _ = held[0]
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        for _, other in held:
            other.transport.abort()


async def test_the_callback_of_a_stock_trainer_reports(
    job: Reporting, post: Post, token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(token)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"https://127.0.0.1:{post.port}{job.path}")
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(post.ca))
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations import integration_utils

    assert "kubeflow" in integration_utils.get_available_reporting_integrations()
    callback = integration_utils.KubeflowCallback()
    state = TrainerState(max_steps=40, is_world_process_zero=True, is_local_process_zero=True)
    args, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"), TrainerControl()
    accepted = []
    send = callback._update_status

    def noted(**kwargs: Any) -> bool:
        accepted.append(send(**{**kwargs, "force": True}))  # without the five seconds between two reports
        return bool(accepted[-1])

    monkeypatch.setattr(callback, "_update_status", noted)
    await asyncio.to_thread(callback.on_train_begin, args, state, control)
    await seen(job, progressPercentage=0)
    callback.on_log(args, state, control, logs={"loss": 2.25, "learning_rate": 1e-4})
    for step in (10, 20):
        state.global_step, state.epoch = step, step / 40
        await asyncio.to_thread(callback.on_step_end, args, state, control)
    status = await seen(job, step=20, totalSteps=40, progressPercentage=50)
    assert {"name": "loss", "value": "2.25"} in status["metrics"]
    assert "estimatedRemainingSeconds" in status
    await asyncio.to_thread(callback.on_train_end, args, state, control)
    await seen(job, progressPercentage=100)
    assert accepted == [True, True, True, True]
