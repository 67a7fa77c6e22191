"""Training that is watched: evaluated on its way, stopped early with its best weights, ended where it diverges."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_api.failures import EXIT_CODES, Reason
from finetune_trainer import state
from support.gang import Gang, make_gang, make_tiny_model
from support.s3 import S3, running_s3

pytestmark = [pytest.mark.integration, pytest.mark.gang]

# Twelve examples, learned by heart: from some step on the held-out ones suffer.
MEMORISE: dict[str, Any] = {
    "examples": 12,
    "validation": 12,
    "micro_batch": 2,
    "training": {
        "maxSteps": 60,
        "globalBatchSize": 4,
        "learningRate": 0.02,
        "schedule": "Constant",
        "earlyStopping": {"metric": "eval_loss", "patience": 2},
    },
    "evaluation": {"everySteps": 4},
    "checkpoint": {"interval": {"type": "Steps", "steps": 3}, "keep": 1},
}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def watched_gang(directory: Path, s3: S3, model: Path, prefix: str, **changes: Any) -> Gang:
    settings = MEMORISE | changes
    held_out = settings.pop("validation")
    gang = make_gang(directory, s3, model, bucket_prefix=prefix, validation=held_out, **settings)
    fields = gang.config.to_json()
    fields["spec"]["validation"] = {"fraction": 0.1}
    gang.config = type(gang.config).model_validate(fields)
    return gang


def history(gang: Gang) -> list[dict[str, float]]:
    """One entry for each logged step."""
    text = gang.s3.get(f"{gang.config.output_uri}{gang.attempt_uid}/metrics.jsonl").decode()
    return [entry for entry in map(json.loads, text.splitlines()) if "step" in entry]


def evaluations(gang: Gang) -> dict[int, float]:
    return {int(entry["step"]): entry["eval_loss"] for entry in history(gang) if "eval_loss" in entry}


@pytest.fixture(scope="module")
def stopped(s3: S3, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Gang:
    """A gang of two that memorises, and is stopped for it."""
    gang = watched_gang(tmp_path_factory.mktemp("whole"), s3, model, "stopped")
    gang.run()
    return gang


def test_training_stops_early_and_publishes_the_best_weights(stopped: Gang, tmp_path: Path) -> None:
    seen = evaluations(stopped)
    last = int(history(stopped)[-1]["step"])
    best = min(seen, key=lambda step: seen[step])
    assert list(seen) == list(range(4, last + 1, 4))
    assert last == best + 8 < 60
    final = json.loads((stopped.published(tmp_path) / "metrics.jsonl").read_text().splitlines()[-1])["final"]
    assert final["bestStep"] == best
    assert final["evalLoss"] == pytest.approx(seen[best], abs=1e-5)
    assert final["evalLoss"] < seen[last]
    # One is kept of the newest, and the best one beside it.
    assert stopped.checkpoints() == [best, last]


def test_over_fitting_is_named(stopped: Gang, tmp_path: Path) -> None:
    seen = evaluations(stopped)
    best = min(seen, key=lambda step: seen[step])
    sentence = f"training falls, validation rises since step {best}"
    assert stopped.events("over-fitting")[-1]["message"] == sentence
    assert sentence in (stopped.published(tmp_path) / "README.md").read_text()


@pytest.mark.parametrize("strategy", ["DDP", "ZeRO3"])
def test_a_run_that_was_interrupted_stops_at_the_same_step(
    strategy: str, stopped: Gang, s3: S3, model: Path, tmp_path: Path
) -> None:
    prefix = f"again-{strategy}".lower()
    gang = watched_gang(tmp_path / "0", s3, model, prefix, strategy=strategy)
    gang.start()
    gang.until(lambda: len(gang.events("step")) >= 5, timeout=180)
    gang.signal(1)
    assert {message.reason for message in gang.wait()} == {Reason.PREEMPTED}, gang.log()
    after = watched_gang(tmp_path / "1", s3, model, prefix, workers=1, micro_batch=4)
    after.attempt_uid = "attempt-1"
    message = after.run()
    assert message.resumed_from_step
    assert evaluations(after) == pytest.approx(evaluations(stopped), abs=1e-3)
    assert after.losses() == pytest.approx(stopped.losses(), abs=1e-3)
    assert message.result
    assert message.result.metrics["bestStep"] == min(evaluations(stopped), key=lambda s: evaluations(stopped)[s])


def test_what_stopped_early_is_not_trained_further(stopped: Gang, s3: S3, model: Path, tmp_path: Path) -> None:
    """Publishing failed, say: the next attempt finds the last checkpoint and the best one."""
    after = watched_gang(tmp_path, s3, model, "stopped", workers=1, micro_batch=4)
    after.attempt_uid = "attempt-1"
    message = after.run()
    assert message.resumed_from_step == stopped.checkpoints()[-1]
    assert not after.events("step")
    assert message.result
    seen = evaluations(stopped)
    assert message.result.metrics["evalLoss"] == pytest.approx(min(seen.values()), abs=1e-5)


def test_a_checkpoint_whose_best_one_is_gone_is_not_resumed(s3: S3, model: Path, tmp_path: Path) -> None:
    short = MEMORISE["training"] | {"maxSteps": 16, "earlyStopping": {"patience": 9}}
    keep = {"checkpoint": {"interval": {"type": "Steps", "steps": 3}, "keep": 9}}
    first = watched_gang(tmp_path / "0", s3, model, "gone", workers=1, micro_batch=4, training=short, **keep)
    first.run()
    seen, saved = evaluations(first), first.checkpoints()
    best = min(seen, key=lambda step: seen[step])
    key = f"{first.config.scratch_uri}checkpoints/step-{best:08d}/manifest.json".removeprefix("s3://bucket/")
    s3.client().delete_object(Bucket="bucket", Key=key)
    after = watched_gang(tmp_path / "1", s3, model, "gone", workers=1, micro_batch=4, training=short, **keep)
    after.attempt_uid = "attempt-1"
    message = after.run()
    assert message.resumed_from_step == max(step for step in saved if step < best)
    assert evaluations(after) == pytest.approx(seen, abs=1e-4)


def test_what_diverges_ends_with_its_last_good_checkpoint(s3: S3, model: Path, tmp_path: Path) -> None:
    training = {"maxSteps": 40, "learningRate": 4, "warmupRatio": 0.25, "schedule": "Constant"}
    every = {"checkpoint": {"interval": {"type": "Steps", "steps": 1}, "keep": 1}}
    gang = make_gang(tmp_path, s3, model, bucket_prefix="diverged", training=training, tuning={"type": "Full"}, **every)
    messages = gang.start().wait()
    assert {message.reason for message in messages} == {Reason.DIVERGED}, gang.log()
    assert {process.exitcode for process in gang.processes} == {EXIT_CODES[Reason.DIVERGED]}
    losses = {event["step"]: event["loss"] for event in gang.events("step")}
    assert max(losses) == 11  # the first step after the warm-up
    assert losses[11] > 3 * losses[1]
    (good,) = gang.checkpoints()
    assert losses[good] < 3 * losses[1]
    (said,) = {message.message for message in messages}
    assert "the training loss has risen from" in said
    assert "a lower training.learningRate (now 4)" in said
    scratch = gang.config.scratch_uri
    assert f"the last good checkpoint is of step {good}: {scratch}checkpoints/step-{good:08d}/" in said
    sound = f"{scratch}good/job/step-{good:08d}/"
    assert said.endswith(f"a job can start from its weights with baseModel.uri {sound}")
    kept = AutoModelForCausalLM.from_pretrained(gang.fetch(sound, tmp_path / "good")).state_dict()
    saved = state.parameters_of(gang.work(0).checkpoints / f"step-{good:08d}")
    assert saved
    assert all(torch.equal(kept[name], value.to(kept[name].dtype)) for name, value in saved.items())
