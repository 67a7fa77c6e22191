"""Stages one after the other: real pods over gloo, each stage from what the one before left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.manifest import Manifest
from support.s3 import S3, running_s3
from support.staging import StagedJob, jsonl, make_staged_job
from support.teaching import BAD, GOOD, make_model
from support.warm import warm_start

pytestmark = pytest.mark.integration
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def warm() -> Iterator[dict[str, str]]:
    with warm_start() as variables:
        yield variables


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def s3(model: Path) -> Iterator[S3]:
    with running_s3() as server:
        for path in model.iterdir():
            server.put(f"s3://bucket/models/tiny/{path.name}", path.read_bytes())
        for name, words in (("good", GOOD), ("bad", BAD)):
            server.put(f"s3://bucket/data/{name}.jsonl", jsonl(answers(words)))
        server.put("s3://bucket/data/preferred.jsonl", jsonl(preferred()))
        yield server


def answers(words: list[str]) -> Iterator[dict[str, Any]]:
    """The same questions whatever the words of the answers."""
    for number in range(96):
        yield {"prompt": f"Number {number}?", "completion": f" {words[number % 8]} {words[(3 * number + 1) % 8]}"}


def preferred() -> Iterator[dict[str, Any]]:
    for good, bad in zip(answers(GOOD), answers(BAD), strict=True):
        yield {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"]}


def dataset(name: str) -> list[dict[str, Any]]:
    return [{"name": name, "uri": f"s3://bucket/data/{name}.jsonl"}]


OTHER_LORA = {"type": "LoRA", "lora": {"rank": 2, "alpha": 4}}
CONTRARY = [{"name": "first", "datasets": dataset("good")}, {"name": "second", "datasets": dataset("bad")}]


def manifest_of(job: StagedJob, uri: str) -> Manifest:
    return Manifest.model_validate_json(job.s3.get(f"{uri}manifest.json"))


@pytest.fixture(scope="module")
def carried(s3: S3, warm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> StagedJob:
    """Two stages with contradictory data and the same tuning, on one worker; finished."""
    job = make_staged_job(tmp_path_factory.mktemp("carried"), s3, warm, "carried", CONTRARY)
    assert job.prepare().reason is None
    job.run()
    return job


def test_what_a_stage_forgets_shows(carried: StagedJob) -> None:
    metrics = manifest_of(carried, "s3://bucket/carried/bot/attempt-0/").run
    assert metrics
    figures = metrics.metrics
    assert figures["first/evalLoss"] < figures["first/evalLossBefore"] - 0.5
    assert figures["first/evalLoss@second"] > figures["first/evalLoss"] + 0.5
    assert figures["second/evalLoss"] == figures["evalLoss"] < figures["evalLossBefore"] - 0.5
