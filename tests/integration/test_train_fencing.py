"""A real gang whose attempt is over without its knowing, and one whose job was done before it began."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api.failures import Reason
from finetune_trainer.fence import Fence
from finetune_trainer.storage import Store
from support.gang import Gang, make_gang, make_tiny_model
from support.pods import Job
from support.s3 import S3, running_s3

pytestmark = [pytest.mark.integration, pytest.mark.gang]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def attempt(number: int, directory: Path, s3: S3, model: Path, prefix: str) -> Gang:
    gang = make_gang(directory / str(number), s3, model, bucket_prefix=prefix, workers=1)
    gang.config = gang.config.model_copy(update={"attempt": number})
    gang.attempt_uid = f"attempt-{number}"
    return gang


def test_a_gang_that_comes_back_late_publishes_nothing(
    s3: S3, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    late = attempt(0, tmp_path, s3, model, "late").start()
    late.until(lambda: len(late.events("step")) >= 1)
    with Store(late.config.storage) as store:
        assert Fence(store, late.config.scratch_uri, late.config.output_uri, 1, "attempt-1").enter() is None
    (message,) = late.wait()
    assert message.reason == Reason.PREEMPTED, late.log()
    assert message.message == "attempt 0 publishes nothing: attempt 1 has begun in the meantime"
    assert message.result is None
    assert not [key for key in s3.keys("bucket", "late/bot/") if key.endswith("manifest.json")]


def test_an_attempt_whose_job_is_done_needs_nothing_of_what_was_removed(
    s3: S3, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last word was lost after the output had been published and the scratch prefix cleaned up."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    job = Job.make(tmp_path / "job", s3, model, "cleaned")
    first = job.attempt()
    assert first.message.reason is None, first.output
    assert job.scratch() == {"data/data-report.json"}
    again = job.attempt()
    assert again.message.reason is None, again.output
    assert again.message.result == first.message.result
    assert '"event": "step"' not in again.output


def test_what_is_to_be_retained_is(s3: S3, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    checkpoint = {"interval": {"type": "Steps", "steps": 8}, "whenComplete": "Retain"}
    job = Job.make(tmp_path / "job", s3, model, "retained", checkpoint=checkpoint)
    assert job.run() == ""
    assert {"data/index.json", "checkpoints/step-00000008/manifest.json"} <= job.scratch()


def test_what_an_earlier_attempt_published_is_not_done_again(s3: S3, model: Path, tmp_path: Path) -> None:
    first = attempt(0, tmp_path, s3, model, "known").run()
    before = s3.keys("bucket", "known/bot/")
    second = attempt(1, tmp_path, s3, model, "known")
    again = second.run()
    assert again.result is not None
    assert again.result == first.result
    assert not second.events("step")
    assert s3.keys("bucket", "known/bot/") == before
