"""Stages one after the other: real pods over gloo, each stage from what the one before left."""

import io
import json
import signal
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from finetune_api.failures import Reason
from finetune_api.manifest import Manifest
from finetune_trainer.results import Record
from support.s3 import S3, running_s3
from support.staging import StagedJob, jsonl, make_staged_job
from support.teaching import BAD, GOOD, make_model

pytestmark = [pytest.mark.integration, pytest.mark.gang]
TOLERANCE = 1e-4


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


def published(job: StagedJob, attempt: int = 0) -> Manifest:
    uri = f"{job.config.output_uri}attempt-{attempt}/manifest.json"
    return Manifest.model_validate_json(job.s3.get(uri))


def figures(job: StagedJob, attempt: int = 0) -> dict[str, float]:
    run = published(job, attempt).run
    assert run
    return run.metrics


def steps(job: StagedJob, attempt: int = 0) -> list[tuple[str, int, float]]:
    """Stage, step and loss of every line of the published metrics."""
    lines = job.s3.get(f"{job.config.output_uri}attempt-{attempt}/metrics.jsonl").decode().splitlines()
    return [(entry["stage"], entry["step"], entry["loss"]) for entry in map(json.loads, lines) if "loss" in entry]


def held_out(job: StagedJob, stage: str) -> list[tuple[list[int], list[int]]]:
    """A stage's validation examples; of pairs the chosen ones."""
    keys = [key for key in job.keys(f"data/{stage}/validation/") if key.endswith(".parquet")]
    tables = [pq.read_table(io.BytesIO(job.s3.get(job.config.scratch_uri + key))) for key in keys]
    return [(row["input_ids"], row["labels"]) for table in tables for row in table.to_pylist()]


def loss_of(model: Any, examples: list[tuple[list[int], list[int]]]) -> float:
    """Nats per token that carries loss, one example at a time."""
    import torch

    total = count = 0.0
    with torch.no_grad():
        for ids, labels in examples:
            logits, targets = model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            count += int((targets != -100).sum())
    return total / count


@pytest.fixture(scope="module")
def carried(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> StagedJob:
    """Two stages with contradictory data and the same tuning, on one worker; finished."""
    job = make_staged_job(tmp_path_factory.mktemp("carried"), s3, "carried", CONTRARY)
    assert job.prepare().reason is None
    job.run()
    return job


def test_what_a_stage_forgets_shows(carried: StagedJob) -> None:
    found = figures(carried)
    assert found["first/evalLoss"] < found["first/evalLossBefore"] - 0.5
    assert found["first/evalLoss@second"] > found["first/evalLoss"] + 0.5
    assert found["second/evalLoss"] == found["evalLoss"] < found["evalLossBefore"] - 0.5
    assert [stage for stage, _, _ in steps(carried)] == ["first"] * 8 + ["second"] * 8


def test_an_adapter_that_was_carried_on_loads_in_plain_peft(carried: StagedJob, model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert published(carried).kind == "Adapter"
    folder = carried.download(f"{carried.config.output_uri}attempt-0/", tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder).eval()
    found = figures(carried)
    assert loss_of(loaded, held_out(carried, "second")) == pytest.approx(found["evalLoss"], abs=TOLERANCE)
    assert loss_of(loaded, held_out(carried, "first")) == pytest.approx(found["first/evalLoss@second"], abs=TOLERANCE)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("models/tiny/")


def test_what_a_stage_leaves_in_the_scratch_prefix(carried: StagedJob) -> None:
    assert not carried.keys("checkpoints/first/")
    assert {key.rpartition("/")[2] for key in carried.keys("stages/first/")} >= {
        "manifest.json",
        "record.json",
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    # The last stage publishes the job's output and leaves nothing else.
    assert not carried.keys("stages/second/")


def test_a_stage_that_is_finished_is_not_repeated(carried: StagedJob, s3: S3, tmp_path: Path) -> None:
    """On two workers, the second of which is asked to end while stage two is trained."""
    often = {"checkpoint": {"interval": {"type": "Steps", "steps": 2}, "keep": 2}}
    slow = [CONTRARY[0], CONTRARY[1] | {"training": {"maxSteps": 24}}]
    job = make_staged_job(tmp_path, s3, "again", slow, workers=2, **often)
    assert job.prepare().reason is None
    first = job.start()
    first.until(lambda: len([event for event in first.events("step") if event["of"] == 24]) >= 3)
    first.processes[1].send_signal(signal.SIGTERM)
    assert {message.reason for message in first.wait()} == {Reason.PREEMPTED}, first.log()
    assert [event["stage"] for event in first.events("stage starts")] == ["first", "second"]
    (saved,) = {int(key.split("step-")[1][:8]) for key in job.keys("checkpoints/second/") if "manifest" in key} - {2}

    second = job.start()
    message = second.done()
    assert message.resumed_from_step == saved
    assert [event["stage"] for event in second.events("stage starts")] == ["second"]
    assert [(stage, step) for stage, step, _ in steps(job, 1)] == [
        *(("first", step) for step in range(1, 9)),
        *(("second", step) for step in range(1, 25)),
    ]
    # The first stage is that of one worker; the second has other steps.
    alone, both = ([loss for _, _, loss in found[:8]] for found in (steps(carried), steps(job, 1)))
    assert both == pytest.approx(alone, abs=1e-3)
    assert figures(job, 1)["first/evalLoss"] == pytest.approx(figures(carried)["first/evalLoss"], abs=1e-3)


def test_adapters_are_merged_where_the_next_stage_trains_another(s3: S3, model: Path, tmp_path: Path) -> None:
    """SFT, then DPO with another LoRA, on two workers: both pods merge, and the whole model is published."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stages = [
        {"name": "sft", "datasets": dataset("good")},
        {"name": "dpo", "method": {"type": "DPO"}, "tuning": OTHER_LORA, "datasets": dataset("preferred")},
    ]
    job = make_staged_job(tmp_path / "job", s3, "merged", stages, workers=2)
    assert job.prepare().reason is None
    attempt = job.start()
    attempt.done()
    assert [event["origin"] for event in attempt.events("stage starts")] == [
        "the base model",
        "the adapter of stage sft, merged into its model",
    ]
    assert published(job).kind == "Model"
    found = figures(job)
    assert found["dpo/rewardMargin"] > 0.1
    assert found["dpo/preferenceAccuracy"] > 0.9
    whole = AutoModelForCausalLM.from_pretrained(job.download(f"{job.config.output_uri}attempt-0/", tmp_path / "out"))
    assert loss_of(whole, held_out(job, "sft")) == pytest.approx(found["sft/evalLoss@dpo"], abs=TOLERANCE)
    # The chosen answers' loss is told too, since DPO's own is another.
    assert loss_of(whole, held_out(job, "dpo")) == pytest.approx(found["dpo/evalLoss@dpo"], abs=TOLERANCE)
    # What was held out where answers were taught is held out where they are preferred.
    assert held_out(job, "sft") == held_out(job, "dpo")

    # The reference is the model as the first stage left it.
    folder = job.download(f"{job.config.scratch_uri}stages/sft/", tmp_path / "sft")
    before = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder).merge_and_unload()
    assert loss_of(before, held_out(job, "sft")) == pytest.approx(found["sft/evalLoss"], abs=TOLERANCE)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), whole.parameters(), strict=True))


def test_an_adapter_upon_a_model_that_was_trained_whole(s3: S3, tmp_path: Path) -> None:
    """Full, then LoRA."""
    from transformers import AutoModelForCausalLM

    full = {"tuning": {"type": "Full"}, "training": {"learningRate": 0.005}}
    stages = [{"name": "full", "datasets": dataset("good")} | full, {"name": "lora", "datasets": dataset("bad")}]
    job = make_staged_job(tmp_path / "job", s3, "whole", stages)
    assert job.prepare().reason is None
    job.run()
    assert published(job).kind == "Model"
    found = figures(job)
    whole = AutoModelForCausalLM.from_pretrained(job.download(f"{job.config.output_uri}attempt-0/", tmp_path / "out"))
    assert loss_of(whole, held_out(job, "lora")) == pytest.approx(found["evalLoss"], abs=TOLERANCE)
    assert found["full/evalLoss"] < found["full/evalLossBefore"]
    assert found["evalLoss"] < found["evalLossBefore"]


def test_rows_that_a_stage_wrote_are_prepared_in_the_gang(s3: S3, tmp_path: Path) -> None:
    """What the stage that generates leaves is put there by hand: an earlier attempt may have run it."""
    stages = [
        {"name": "written", "generate": {"count": 96}},
        {"name": "learned", "datasets": [{"name": "rows", "uri": "stage://written"}]},
    ]
    job = make_staged_job(tmp_path, s3, "rows", stages, workers=2, datasets=dataset("good"))
    prepared = job.prepare().prepared
    assert prepared
    assert [part.max_tokens > 0 for part in prepared.stages] == [True, False]
    assert not job.keys("data/learned/")

    uri = f"{job.config.scratch_uri}stages/written/"
    files = {"rows.jsonl": jsonl(answers(BAD)), "record.json": Record().model_dump_json().encode()}
    entries = [{"key": key, "size": len(data), "sha256": sha256(data).hexdigest()} for key, data in files.items()]
    head = {"kind": "Rows", "step": 0, "createdTime": "2026-01-01T00:00:00Z", "specSha256": job.config.spec_sha256}
    for key, data in (*files.items(), ("manifest.json", json.dumps(head | {"files": entries}).encode())):
        s3.put(uri + key, data)
    attempt = job.start()
    attempt.done()
    assert [event["stage"] for event in attempt.events("stage starts")] == ["learned"]
    assert 60 < attempt.events("stage prepared")[0]["examples"] < 96
    assert published(job).kind == "Adapter"
    assert figures(job)["evalLoss"] < figures(job)["evalLossBefore"]
