"""A stage that generates: a model that knows the manner writes rows, and the next stage learns them."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from support.s3 import S3, running_s3
from support.staging import StagedJob, jsonl, make_staged_job
from support.teaching import GOOD
from support.tiny import make_tiny_model
from support.writing import KNOWN, known_rows, make_writer

pytestmark = [pytest.mark.integration, pytest.mark.gang]
GENERATE = {"count": 24, "shots": 1, "maxNewTokens": 40, "temperature": 1.0, "maxSimilarity": 0.9}
SEEDS = [{"name": "known", "uri": "s3://bucket/data/known.jsonl"}]
ROWS = [{"name": "more", "uri": "stage://more"}]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    writer = make_writer(tmp_path_factory.mktemp("writer"))
    pupil = make_tiny_model(tmp_path_factory.mktemp("pupil"), vocab_text=" ".join(GOOD), max_positions=256)
    with running_s3() as server:
        for name, folder in (("tiny", writer), ("pupil", pupil)):
            for path in folder.iterdir():
                server.put(f"s3://bucket/models/{name}/{path.name}", path.read_bytes())
        server.put("s3://bucket/data/known.jsonl", jsonl(known_rows()))
        yield server


def job_of(directory: Path, s3: S3, name: str, workers: int = 1, **fields: Any) -> StagedJob:
    generate = GENERATE | fields.pop("generate", {})
    stages = [{"name": "more", "datasets": SEEDS, "generate": generate}, {"name": "learn", "datasets": ROWS}]
    training = {"globalBatchSize": 4, "maxSteps": 3, "learningRate": 0.01, "maxLength": 64}
    options = {"validation": None, "training": training, "dataPolicy": {"similarity": 1}} | fields
    chosen = {key: value for key, value in options.items() if value is not None}
    return make_staged_job(directory, s3, name, stages, workers=workers, micro_batch=2, **chosen)


def written(job: StagedJob) -> list[dict[str, Any]]:
    data = job.s3.get(job.config.scratch_uri + "stages/more/rows.jsonl").decode()
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(scope="module")
def alone(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> StagedJob:
    """By one worker; finished."""
    job = job_of(tmp_path_factory.mktemp("alone"), s3, "alone")
    assert job.prepare().reason is None
    job.run()
    return job


def test_rows_are_new_say_where_they_come_from_and_are_learned(alone: StagedJob) -> None:
    rows = written(alone)
    assert len(rows) == GENERATE["count"]
    known = {pair.instruction for pair in KNOWN}
    assert not known & {row["instruction"] for row in rows}
    assert len({row["instruction"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row["source"]) == {"stage", "model", "request", "seeds"}
        assert -10 < row["score"] < 0
    report = json.loads(alone.s3.get(alone.config.scratch_uri + "data/learn/data-report.json"))
    assert [(d["name"], d["format"], d["rowsRead"]) for d in report["datasets"]] == [("more", "Instruction", len(rows))]
    uri = f"{alone.config.output_uri}attempt-0/manifest.json"
    metrics = json.loads(alone.s3.get(uri))["run"]["metrics"]
    assert metrics["more/rowsKept"] == len(rows)
    assert metrics["more/requests"] == 1 + max(row["source"]["request"] for row in rows)
    assert "learn/trainLoss" in metrics


def test_two_workers_write_the_same_rows_and_so_does_a_teacher(alone: StagedJob, s3: S3, tmp_path: Path) -> None:
    teacher = {"teacher": {"uri": "s3://bucket/models/tiny/"}}
    pupil = {"uri": "s3://bucket/models/pupil/"}
    job = job_of(tmp_path, s3, "taught", workers=2, generate=teacher, baseModel=pupil)
    assert job.prepare().reason is None
    job.run()
    one, two = written(alone), written(job)
    assert [(row["instruction"], row["output"]) for row in one] == [(row["instruction"], row["output"]) for row in two]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], abs=1e-3)
    assert {row["source"]["model"] for row in two} == {"s3://bucket/models/tiny/"}


def test_a_stage_that_is_interrupted_goes_on_where_it_was(alone: StagedJob, s3: S3, tmp_path: Path) -> None:
    job = job_of(tmp_path, s3, "interrupted")
    assert job.prepare().reason is None
    attempt = job.start()
    attempt.until(lambda: any(event.get("phase") == "Training" for event in attempt.events("phase")))
    attempt.processes[0].send_signal(signal.SIGTERM)
    (message,) = attempt.wait()
    assert message.reason == Reason.PREEMPTED, attempt.log()
    again = job.start()
    again.done()
    assert again.events("rows found")
    assert [row["instruction"] for row in written(job)] == [row["instruction"] for row in written(alone)]
    assert not job.keys("stages/more-partial")


def test_a_model_that_cannot_write_rows_is_told_of(s3: S3, tmp_path: Path) -> None:
    job = job_of(
        tmp_path,
        s3,
        "dumb",
        generate={"count": 1, "maxNewTokens": 4},
        baseModel={"uri": "s3://bucket/models/pupil/"},
    )
    assert job.prepare().reason is None
    (message,) = job.start().wait()
    assert message.reason == Reason.DATA_INVALID
    expected = r"spec.stages\[0\].generate: none of \d+ answers passed the filters \(\d+ unreadable\)"
    assert re.match(expected, message.message), message.message
