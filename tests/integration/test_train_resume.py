"""A run that is interrupted and resumed learns what an uninterrupted one learns."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import EXIT_CODES, Reason
from support.gang import Gang, make_gang, make_tiny_model
from support.s3 import S3, running_s3

pytestmark = [pytest.mark.integration, pytest.mark.gang]

STEPS = 24
# Dropout makes the result depend on the random numbers of every step.
SETTINGS: dict[str, Any] = {
    "training": {"maxSteps": STEPS, "learningRate": 0.005},
    "micro_batch": 8,
    "tuning": {"type": "LoRA", "lora": {"rank": 4, "alpha": 8, "dropout": 0.2}},
}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(s3: S3, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Gang:
    """A finished gang that nothing interrupted."""
    gang = make_gang(tmp_path_factory.mktemp("whole"), s3, model, bucket_prefix="whole", **SETTINGS)
    gang.run()
    return gang


def interrupted(gang: Gang, rank: int, step: int) -> Gang:
    """Starts a gang and asks one of its pods to end after some steps; the gang has ended."""
    gang.start()
    gang.until(lambda: len(gang.events("step")) >= step)
    gang.signal(rank)
    messages = gang.wait()
    for message, process in zip(messages, gang.processes, strict=True):
        assert message.reason == Reason.PREEMPTED, gang.log()
        assert process.exitcode == EXIT_CODES[Reason.PREEMPTED]
    return gang


def next_attempt(gang: Gang, directory: Path, model: Path, **changes: Any) -> Gang:
    """The same job on new pods with empty disks."""
    prefix = gang.config.scratch_uri.removeprefix("s3://bucket/").partition("/")[0]
    after = make_gang(directory, gang.s3, model, bucket_prefix=prefix, **(SETTINGS | changes))
    after.attempt_uid = "attempt-1"
    return after


@pytest.mark.parametrize(("first", "second"), [("ZeRO2", "ZeRO2"), ("ZeRO3", "DDP"), ("DDP", "ZeRO3")])
def test_a_signalled_gang_resumes_where_it_stopped(
    first: str, second: str, whole: Gang, s3: S3, model: Path, tmp_path: Path
) -> None:
    prefix = f"stop-{first}-{second}".lower()
    gang = make_gang(tmp_path / "0", s3, model, bucket_prefix=prefix, strategy=first, **SETTINGS)
    interrupted(gang, rank=1, step=3)
    (saved,) = gang.checkpoints()
    assert 3 <= saved < STEPS
    assert not s3.keys("bucket", f"{prefix}/bot/")

    after = next_attempt(gang, tmp_path / "1", model, strategy=second)
    message = after.run()
    assert message.resumed_from_step == saved
    assert message.result
    assert after.losses() == pytest.approx(whole.losses(), abs=1e-4)


def test_a_killed_rank_ends_the_gang_which_resumes_from_the_newest_sound_checkpoint(
    whole: Gang, s3: S3, model: Path, tmp_path: Path
) -> None:
    every_four = {"checkpoint": {"interval": {"type": "Steps", "steps": 4}, "keep": 2}}
    gang = make_gang(tmp_path / "0", s3, model, bucket_prefix="kill", **(SETTINGS | every_four))
    gang.start()
    gang.until(lambda: len(gang.events("checkpoint saved")) >= 3)
    gang.signal(1, signal.SIGKILL)
    gang.processes[0].join(30)
    assert gang.processes[0].exitcode == EXIT_CODES[Reason.RANK_FAILED], gang.log()
    gang.kill()
    older, newer = gang.checkpoints()[-2:]
    s3.put(f"{gang.config.scratch_uri}checkpoints/step-{newer:08d}/adapter.safetensors", b"torn")

    shutil.rmtree(tmp_path / "0")
    after = next_attempt(gang, tmp_path / "1", model, **every_four)
    message = after.run()
    assert message.resumed_from_step == older
    assert [event["uri"] for event in after.events("checkpoint skipped")] == [
        f"{gang.config.scratch_uri}checkpoints/step-{newer:08d}/"
    ]
    assert after.losses() == pytest.approx(whole.losses(), abs=1e-4)
    # `keep` of them, the last step's among them; a step that came while the one before was on its way is made up for.
    kept = after.checkpoints()
    assert len(kept) == 2
    assert kept[-1] == STEPS


def test_a_finished_training_is_not_repeated(whole: Gang, model: Path, tmp_path: Path) -> None:
    """The checkpoint of the last step is what is left when publishing fails; here fewer workers take it up."""
    after = next_attempt(whole, tmp_path, model, workers=1, micro_batch=16)
    message = after.run()
    assert message.resumed_from_step == STEPS
    assert not after.events("step")
    assert message.result
    assert after.losses() == pytest.approx(whole.losses(), abs=1e-9)
    figures = message.result.metrics
    assert figures["evalLoss"] < figures["evalLossBefore"]
    final = json.loads(whole.s3.get(f"{whole.config.output_uri}attempt-0/metrics.jsonl").splitlines()[-1])["final"]
    assert figures["evalLoss"] == pytest.approx(final["evalLoss"], abs=1e-5)


def test_a_checkpoint_of_another_spec_is_not_resumed(s3: S3, model: Path, tmp_path: Path) -> None:
    short = {"training": {"maxSteps": 2}, "workers": 1, "micro_batch": 16}
    first = make_gang(tmp_path / "0", s3, model, bucket_prefix="spec", **short)
    first.run()
    other = make_gang(tmp_path / "1", s3, model, bucket_prefix="spec", **short)
    other.config = other.config.model_copy(update={"spec_sha256": "1" * 64})
    other.attempt_uid = "attempt-1"
    message = other.run()
    assert message.resumed_from_step is None
    assert "not a checkpoint of this job's spec" in other.events("checkpoint skipped")[0]["why"]
