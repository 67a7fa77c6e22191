"""Signals to each rank in each phase: the job ends as if nothing had been, and its status says what was."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune_api.failures import Reason
from support.gang import make_gang, make_tiny_model
from support.pods import PHASES, Blow, Job, expected
from support.s3 import S3, running_s3
from support.tally import Tally

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800), pytest.mark.gang]
ALL = [
    Blow(phase, number, rank)
    for phase in PHASES
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
    # One process downloads, and one publishes.
    for rank in ((0,) if phase in ("Pulling", "Publishing") else (0, 1))
]
SAMPLE = [
    Blow("Saving", signal.SIGKILL, 0),
    Blow("Step", signal.SIGSTOP, 1),
]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def test_a_job_survives_what_happens_to_its_ranks(
    s3: S3, model: Path, tmp_path: Path, whole: bool, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    results = {}
    undisturbed = Job.make(tmp_path / "undisturbed", s3, model, "undisturbed")
    assert undisturbed.run() == ""
    wanted = undisturbed.adapter()
    for number, blow in enumerate(ALL if whole else SAMPLE):
        job = Job.make(tmp_path / str(number), s3, model, f"blow-{number}")
        try:
            results[str(blow)] = job.run(blow) or wrong(job, blow, wanted)
        except AssertionError as error:
            results[str(blow)] = str(error)
    tally.count("signals to ranks", results)


def wrong(job: Job, blow: Blow, wanted: dict[str, torch.Tensor]) -> str:
    """What is not as without the blow, or was not told."""
    struck = job.attempts[0].message
    if struck.reason not in expected(blow):
        return f"the attempt ended with {struck.reason}: {struck.message}"
    if blow.number != signal.SIGTERM and blow.phase != "Pulling" and struck.rank != blow.rank:
        return f"rank {struck.rank} was named: {struck.message}"
    if struck.reason == Reason.HUNG and ("node-1" not in struck.message or struck.node != "node-1"):
        return f"no node was named: {struck.message}"
    if len(job.published) != 1:
        return f"published were {job.published}"
    if left := job.open_uploads():
        return f"uploads were left open: {left}"
    if job.scratch() != {"data/data-report.json"}:
        return f"the scratch prefix holds {job.scratch()}"
    found = job.adapter()
    if found.keys() != wanted.keys() or not all(torch.allclose(found[k], v, atol=1e-5) for k, v in wanted.items()):
        return "another adapter was learned"
    # By then there was a checkpoint.
    late = blow.phase in ("Step", "Saving", "Publishing") and len(job.attempts) > 1
    if late and not job.attempts[-1].message.resumed_from_step:
        return "it began anew"
    return ""


def test_a_rank_that_is_steadily_slow_is_reported(s3: S3, model: Path, tmp_path: Path, whole: bool) -> None:
    if not whole:
        pytest.skip("in make faults")
    training = {"maxSteps": 400, "learningRate": 0.005}
    gang = make_gang(tmp_path, s3, model, bucket_prefix="slow", training=training, validation=0)
    gang.env["FINETUNE_NODE_NAME"] = "node-7"
    gang.start()
    gang.until(lambda: gang.events("step"))

    def told() -> bool:
        gang.signal(1, signal.SIGSTOP)
        time.sleep(0.03)  # most of the time it stands still
        gang.signal(1, signal.SIGCONT)
        return bool(gang.events("slow rank"))

    gang.until(told)
    gang.kill()
    said = gang.events("slow rank")[0]["message"]
    assert said.startswith("rank 1 on node node-7 is steadily slow: its forward passes take "), said
