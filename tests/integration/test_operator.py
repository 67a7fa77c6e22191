"""The operator as a process, before an API server with its Job controller and its garbage collector.

No node runs the pods: the test tells of them what a kubelet would.
"""

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import pytest

from finetune_api.failures import Reason, TerminationMessage
from support.api import Object
from support.operating import Scene
from support.waiting import eventually
from support.world import PREPARED, RESULT

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.integration


@pytest.fixture
async def live(scene: Scene) -> Scene:
    """With an operator."""
    await scene.operator.start()
    return scene


async def quiet(scene: Scene, seconds: float = 2.0) -> None:
    """Fails where anything is written meanwhile. The span is the measurement here, not a wait for something."""
    before = list(scene.proxy.writes)
    await asyncio.sleep(seconds)
    assert scene.proxy.writes == before


async def test_from_the_manifest_to_the_result(live: Scene) -> None:
    await live.submit(distribution={"workers": 2})
    await live.reaches("Preparing")
    await live.run("j-prepare")
    await live.end("j-prepare", message=TerminationMessage(prepared=PREPARED))
    status = await live.reaches("Starting")
    written = len(live.proxy.writes)
    assert written <= 10, live.proxy.writes
    assert status["data"]["trainExamples"] == 1000
    assert status["sizing"]["strategy"] == "DDP"
    [attempt] = status["attempts"]
    gang = (await live.api.get(live.path("jobs", "j-0"))).must(200)
    assert attempt["uid"] == gang["metadata"]["uid"]
    await live.run("j-0", 2)
    await live.reaches("Running")
    await quiet(live)
    await live.completed("j-0", 2)
    status = await live.reaches("Complete")
    assert status["result"]["uri"] == RESULT.uri
    conditions = {c["type"]: c["status"] for c in status["conditions"]}
    assert conditions["Complete"] == "True"
    assert conditions["Reconciling"] == conditions["Failed"] == "False"
    await quiet(live)
    job = (await live.api.get(live.job_path())).must(200)
    assert "finalizers" not in job["metadata"]
    assert "annotations" not in job["metadata"]
    events = await live.api.items(live.path("events", api="/api/v1"), fieldSelector="involvedObject.kind=FineTuneJob")
    reasons = {event["reason"] for event in events}
    assert {"Preparing", "Prepared", "AttemptStarted", "Running", "Complete"} <= reasons


@pytest.mark.slow
async def test_prepare_is_tried_again_for_a_store_that_is_away_and_not_for_bad_data(live: Scene) -> None:
    await live.submit()
    await live.reaches("Preparing")
    away = TerminationMessage(reason=Reason.STORAGE_UNAVAILABLE, message="no answer")
    await live.end("j-prepare", message=away, code=71)
    bad = TerminationMessage(reason=Reason.DATA_INVALID, message="s3://data/tickets.jsonl line 7: not JSON")
    await live.end("j-prepare", message=bad, code=66)
    status = await live.reaches("Failed")
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "DataInvalid"
    assert "s3://data/tickets.jsonl line 7: not JSON" in status["message"]
    assert await live.jobs() == ["j-prepare"]


async def test_what_does_not_go_together_fails_with_its_field_and_no_pod(live: Scene) -> None:
    await live.submit(method={"type": "PPO"})
    status = await live.reaches("Failed")
    assert status["message"].startswith("spec.method.ppo.rewardModel: found none; PPO learns from the scores of a")
    assert await live.jobs() == []
    assert len(live.proxy.writes) == 1


async def test_a_gate_that_is_not_met_fails_the_job_with_its_result(live: Scene) -> None:
    gates = [{"metric": "evalLoss", "operator": "AtMost", "value": 1}]
    await live.submit(distribution={"workers": 2}, validation={"fraction": 0.1}, evaluation={"gates": gates})
    await live.prepared()
    await live.reaches("Starting")
    await live.run("j-0", 2)
    await live.reaches("Running")
    text = "spec.evaluation.gates[0]: evalLoss is 1.5; at most 1 is wanted"
    result = RESULT.model_copy(update={"metrics": {"evalLoss": 1.5}})
    said = TerminationMessage(reason=Reason.GATE_NOT_MET, message=text, exit_code=78, rank=0, result=result)
    # Worker 1 has ended well by then.
    await live.end("j-0", index=1, workers=2, message=TerminationMessage())
    await live.end("j-0", index=0, workers=1, message=said, code=78)
    status = await live.reaches("Failed")
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert (failed["status"], failed["reason"], failed["message"]) == ("True", "GateNotMet", text)
    assert status["result"] == {
        "uri": RESULT.uri,
        "manifestSHA256": RESULT.manifest_sha256,
        "sizeBytes": RESULT.size_bytes,
        "metrics": {"evalLoss": 1.5},
    }
    assert await live.jobs() == ["j-0", "j-prepare"]


async def test_a_job_waits_for_its_profile(live: Scene) -> None:
    await live.submit(profile="nobody-made-it")
    status = await live.reaches("Pending")
    assert "FineTuneProfile 'nobody-made-it' does not exist" in status["message"]
    await quiet(live)


@pytest.mark.slow
async def test_attempts_end_at_the_maximum(live: Scene) -> None:
    await live.submit(runPolicy={"maxAttempts": 2}, distribution={"workers": 2})
    await live.prepared()
    for number in range(2):
        await live.reaches("Starting", timeout=40)
        await live.run(f"j-{number}", 2)
        await live.reaches("Running")
        told = TerminationMessage(reason=Reason.HUNG, message="no step in 300 s", rank=1)
        await live.end(f"j-{number}", index=1, workers=2, message=told, code=75)
        if number == 0:
            status = await live.reaches("Retrying")
            assert "no step in 300 s" in status["message"]
    status = await live.reaches("Failed")
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "MaxAttemptsReached"
    assert [(a["outcome"], a["reason"], a["rank"], a["exitCode"]) for a in status["attempts"]] == [
        ("Retryable", "Hung", 1, 75)
    ] * 2
    assert await live.jobs() == ["j-0", "j-1", "j-prepare"]


async def test_suspend_and_resume(live: Scene) -> None:
    await live.submit()
    await live.prepared()
    await live.run("j-0")
    await live.reaches("Running")
    await live.policy(suspend=True)
    status = await live.reaches("Suspended")
    assert status["attempts"][0]["outcome"] == "Preempted"
    await eventually(live.jobs, "the gang to go", until=lambda jobs: jobs == ["j-prepare"])
    await live.policy(suspend=False)
    await eventually(live.jobs, "the next attempt", until=lambda jobs: jobs == ["j-1", "j-prepare"], timeout=40)
    await live.run("j-1")
    await live.reaches("Running")


async def test_deadline_and_ttl(live: Scene) -> None:
    await live.submit(runPolicy={"activeDeadlineSeconds": 2, "ttlSecondsAfterFinished": 2})
    await live.prepared()
    await live.run("j-0")
    status = await live.reaches("Failed")
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "DeadlineExceeded"
    await eventually(lambda: live.api.get(live.job_path()), "the job to go", until=lambda answer: answer.status == 404)


async def test_deletion_takes_the_children_along_even_while_the_operator_is_away(live: Scene) -> None:
    await live.submit()
    await live.prepared()
    await live.reaches("Starting")
    assert await live.operator.stop() == 0
    (await live.api.delete(live.job_path(), {"propagationPolicy": "Background"})).must(200)

    async def left() -> list[Object]:
        selector = "finetune.dev/job-name=j"
        found = await live.api.items(live.path("jobs"), labelSelector=selector)
        for kind in ("services", "configmaps", "pods"):
            found += await live.api.items(live.path(kind, api="/api/v1"), labelSelector=selector)
        return found

    await eventually(left, "no children", until=lambda found: not found, timeout=40)


async def test_the_probe_tells_the_truth(scene: Scene, unused_tcp_port: int) -> None:
    await scene.operator.start(LIVENESS_PORT=str(unused_tcp_port), STALE_SECONDS="1", RESYNC_SECONDS="3600")
    async with aiohttp.ClientSession() as session:

        async def health() -> int:
            try:
                async with session.get(f"http://127.0.0.1:{unused_tcp_port}/healthz") as response:
                    return response.status
            except aiohttp.ClientError:
                return 0

        # Good after its first LIST; then nothing happens for longer than it may.
        await eventually(health, "a good answer", until=lambda code: code == 200, timeout=20)
        await eventually(health, "a bad answer", until=lambda code: code == 500, timeout=20)


@pytest.mark.parametrize("write", range(1, 11))
async def test_killed_after_any_of_its_writes(scene: Scene, write: int) -> None:
    """Nine lead to the gang, the tenth to the end. After the third and the eighth a Job is there whose UID nobody wrote
    down: creating it is refused, and it is taken up."""
    scene.proxy.kill_after = write
    await scene.operator.start()
    await scene.submit()

    async def alive() -> None:
        """Starts it again where it was killed, as a Deployment would."""
        while True:
            assert scene.operator.process
            await scene.operator.process.wait()
            await scene.operator.start()

    restarts = asyncio.create_task(alive())
    try:
        await scene.prepared()
        await scene.reaches("Starting")
        await scene.completed("j-0")
        status = await scene.reaches("Complete")
    finally:
        restarts.cancel()
        await asyncio.gather(restarts, return_exceptions=True)
    assert len(scene.proxy.writes) >= write
    assert [(a["number"], a["outcome"]) for a in status["attempts"]] == [(0, "Succeeded")]
    assert status["result"]["uri"] == RESULT.uri
    assert await scene.jobs() == ["j-0", "j-prepare"]
    created = [w for w in scene.proxy.writes if w.startswith("POST")]
    assert len(created) == 5 + (write in (3, 8)), created
