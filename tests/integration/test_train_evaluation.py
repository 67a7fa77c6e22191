"""What a gang measures of held-out data, before and after: against plain transformers, one row at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import EXIT_CODES, Reason
from finetune_api.manifest import Manifest
from finetune_trainer.evaluation.answers import SCORES
from support.gang import Gang, make_gang, make_tiny_model
from support.measuring import MeasuredGang, answers, make_judge, make_measured_gang, measured, strides
from support.preferring import make_preference_gang
from support.s3 import S3, running_s3

pytestmark = [pytest.mark.integration, pytest.mark.gang]

TOLERANCE = 2e-5
HELD = {
    "validation": {"near": {"odd": strides(5, 1, 1), "even": strides(4, 2, 2)}, "far": {"": strides(6, 3, 3, 12)}},
    "test": {"near": {"odd": strides(3, 1, 4)}, "far": {"": strides(4, 3, 5)}},
    "retention": {"old": {"": strides(5, 5, 6)}},
}
TRAIN = {"near": strides(32, 1, 7) + strides(16, 2, 8), "far": strides(24, 3, 9)}
METRICS = ["Loss", "ExactMatch", "F1", "Rouge", "Bleu", "Chrf", "Meteor"]
EVALUATION: dict[str, Any] = {
    "metrics": METRICS,
    "generation": {"maxNewTokens": 10, "maxExamples": 50},
    "retention": {"datasets": [{"name": "old", "uri": "s3://bucket/data/old.jsonl"}], "maxRegression": 100},
}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def measuring(directory: Path, s3: S3, model: Path, **arguments: Any) -> MeasuredGang:
    fields: dict[str, Any] = {"evaluation": EVALUATION, "bucket_prefix": directory.name.lower()} | arguments
    fields["training"] = {"maxSteps": 6} | fields.get("training", {})
    return make_measured_gang(directory, s3, model, HELD, TRAIN, **fields)


@pytest.fixture(scope="module")
def alone(s3: S3, model: Path, tmp_path_factory: pytest.TempPathFactory) -> MeasuredGang:
    gang = measuring(tmp_path_factory.mktemp("alone"), s3, model, workers=1, micro_batch=4)
    gang.run()
    return gang


def figures(gang: Gang) -> dict[str, float]:
    """All of them: the status has not room for every one."""
    manifest = json.loads(gang.s3.get(f"{gang.config.output_uri}{gang.attempt_uid}/manifest.json"))
    found = Manifest.model_validate(manifest).run
    assert found
    return found.metrics


def test_every_figure_is_that_of_plain_transformers(alone: MeasuredGang, model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer, found = Tokenizer.from_file(str(model / "tokenizer.json")), figures(alone)
    assert {"validation": 15, "test": 7, "retention": 5}.items() <= alone.events("data")[0].items()
    groups = {
        "validation": ["", ".near", ".far", ".near.odd", ".near.even"],
        "test": ["", ".near", ".far", ".near.odd"],
        "retention": [""],
    }
    titles = set()
    for moment in ("Before", ""):
        if not moment:
            base = PeftModel.from_pretrained(base, alone.published(tmp_path)).eval()
        for split, suffixes in groups.items():
            for suffix in suffixes:
                _, dataset, slice_, *_ = [*suffix.split("."), "", ""]
                rows = alone.rows(split, dataset or None, slice_ or None)
                expected = measured(base, rows)
                said = [tokenizer.decode(tokens) for tokens in answers(base, rows, 10)]
                wanted = [[tokenizer.decode([t for t in labels if t > 2])] for _, labels in rows]
                for metric in METRICS[1:]:
                    expected |= SCORES[metric](said, wanted)
                for name, value in expected.items():
                    title = name if split == "validation" else split + name[0].upper() + name[1:]
                    title = title.replace("EvalLoss", "Loss") + moment + suffix
                    titles.add(title)
                    assert found[title] == pytest.approx(value, rel=1e-4, abs=1e-5), title
    told = {name for name in found if not name.startswith(("train", "planned", "tokens", "best"))}
    assert told == titles


def test_two_workers_measure_what_one_measures(alone: MeasuredGang, s3: S3, model: Path, tmp_path: Path) -> None:
    two = measuring(tmp_path, s3, model)
    two.run()
    expected, found = figures(alone), figures(two)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.startswith(("trainSeconds", "tokensPerSecond")):
            assert found[name] == pytest.approx(value, rel=1e-3, abs=TOLERANCE), name


@pytest.mark.parametrize("room", [True, False])
def test_partitioned_parameters_measure_the_same(
    room: bool, alone: MeasuredGang, s3: S3, model: Path, tmp_path: Path
) -> None:
    """Under ZeRO-3, where the weights find no room on a rank, each forward pass is a collective: no rank may make one
    more than the others."""
    gang = measuring(tmp_path, s3, model, strategy="ZeRO3", micro_batch=8)
    if not room:
        gang.env["LOCAL_WORLD_SIZE"] = str(10**9)  # so many share what there is
    gang.run()
    assert bool(gang.events("weights are gathered for every token")) is not room
    expected, found = figures(alone), figures(gang)
    for name in (
        "evalLossBefore",
        "rougeLBefore",
        "bleuBefore",
        "testLossBefore.near.odd",
        "evalLoss",
        "retentionLoss",
    ):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("tuning", ["LoRA", "Full"])
def test_a_rank_without_questions_waits_for_the_others(tuning: str, s3: S3, model: Path, tmp_path: Path) -> None:
    """Where the weights are gathered, a rank that has nothing to answer has nothing to take part in."""
    gang = make_gang(
        tmp_path,
        s3,
        model,
        bucket_prefix=f"few-{tuning}".lower(),
        strategy="ZeRO3",
        micro_batch=8,
        validation=1,
        tuning={"type": tuning},
        training={"maxSteps": 2, "learningRate": 0.001},
    )
    result = gang.run().result
    assert result
    assert {"evalLossBefore", "evalLoss"} <= result.metrics.keys()


def test_what_is_learned_by_heart_is_answered(s3: S3, model: Path, tmp_path: Path) -> None:
    """A mapping of few prompts: exact match rises from nothing to all, and a reward model tells the better answers."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = strides(6, 7, 11, 8)
    gang = make_measured_gang(
        tmp_path,
        s3,
        model,
        {"validation": {"known": {"": rows}}},
        {"known": rows * 4},
        workers=1,
        micro_batch=8,
        bucket_prefix="heart",
        tuning={"type": "Full"},
        training={"maxSteps": 80, "globalBatchSize": 8, "learningRate": 0.01},
        evaluation={
            "metrics": ["ExactMatch", "Rouge", "Bleu", "WinRate"],
            "generation": {"maxNewTokens": 8},
            "rewardModel": {"uri": "s3://bucket/judge/"},
        },
    )
    judge = make_judge(gang.work(0).judge)
    result = gang.run().result
    assert result
    assert result.metrics["exactMatchBefore"] == 0.0
    assert result.metrics["exactMatch"] == 1.0
    assert result.metrics["rougeL"] == pytest.approx(1.0)
    assert result.metrics["bleuBefore"] < result.metrics["bleu"]
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    was = [row[0][:4] + said for row, said in zip(rows, answers(base, rows, 8, ended=True), strict=True)]
    with torch.no_grad():
        now, before = (
            [float(judge(input_ids=torch.tensor([ids])).logits) for ids in texts]
            for texts in ([r[0] for r in rows], was)
        )
    won = [float(new > old) for new, old in zip(now, before, strict=True)]
    assert result.metrics["winRate"] == pytest.approx(sum(won) / len(won))
    assert "winRateBefore" not in result.metrics


@pytest.mark.parametrize("tuning", ["PromptTuning", "PrefixTuning"])
def test_virtual_tokens_are_in_front_of_every_answer(tuning: str, s3: S3, model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    rows = strides(5, 1, 12)
    member = tuning[0].lower() + tuning[1:]
    gang = make_measured_gang(
        tmp_path,
        s3,
        model,
        {"validation": {"d": {"": rows}}},
        {"d": rows * 4},
        workers=1,
        micro_batch=8,
        bucket_prefix=tuning.lower(),
        tuning={"type": tuning, member: {"tokens": 4}},
        training={"maxSteps": 12, "globalBatchSize": 8, "learningRate": 0.05},
        evaluation={"metrics": ["F1"], "generation": {"maxNewTokens": 8}},
    )
    found = gang.run().result
    assert found
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    loaded = PeftModel.from_pretrained(base, gang.published(tmp_path / "out")).eval()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    said = [tokenizer.decode(tokens) for tokens in answers(loaded, rows, 8)]
    wanted = [[tokenizer.decode([t for t in labels if t > 2])] for _, labels in rows]
    assert found.metrics["f1"] == pytest.approx(SCORES["F1"](said, wanted)["f1"])


def test_a_gate_that_is_not_met_keeps_what_was_published(s3: S3, model: Path, tmp_path: Path) -> None:
    gates = [
        {"metric": "evalLoss", "operator": "AtMost", "value": 0.001},
        {"metric": "evalLoss", "operator": "AtMost", "value": 1000},
    ]
    gang = make_gang(tmp_path, s3, model, bucket_prefix="gate", evaluation={"gates": gates}, training={"maxSteps": 2})
    first, second = gang.start().wait()
    assert [process.exitcode for process in gang.processes] == [EXIT_CODES[Reason.GATE_NOT_MET], 0]
    assert first.reason == Reason.GATE_NOT_MET
    assert first.result
    found = first.result.metrics["evalLoss"]
    assert first.message == f"spec.evaluation.gates[0]: evalLoss is {found:.6g}; at most 0.001 is wanted"
    assert second.reason is None
    manifest = Manifest.model_validate_json(s3.get(f"{first.result.uri}manifest.json"))
    assert "adapter_model.safetensors" in {entry.key for entry in manifest.files}
    assert manifest.run
    assert manifest.run.metrics["evalLoss"] == pytest.approx(found)


@pytest.mark.parametrize("method", ["DPO", "KTO", "ORPO"])
def test_preferences_are_measured_on_the_test_split_too(method: str, s3: S3, model: Path, tmp_path: Path) -> None:
    gang = make_preference_gang(
        tmp_path, s3, model, {"type": method}, bucket_prefix=f"test-{method.lower()}", workers=1, micro_batch=4
    )
    # The same rows in both splits: the same figures.
    gang.rows["test"] = gang.rows["validation"]
    found = gang.run().result
    assert found
    for name in ("Loss", "RewardMargin", "PreferenceAccuracy"):
        for moment in ("Before", ""):
            own = {"Loss": "evalLoss", "RewardMargin": "rewardMargin"}.get(name, "preferenceAccuracy")
            assert found.metrics[f"test{name}{moment}"] == pytest.approx(found.metrics[f"{own}{moment}"], abs=1e-6)


def test_what_was_answered_before_is_known_after_a_restart(s3: S3, model: Path, tmp_path: Path) -> None:
    """The second attempt did not see the model as it was; what the first one wrote down still counts."""
    rows = strides(4, 7, 11, 8)
    spec: dict[str, Any] = {
        "workers": 1,
        "micro_batch": 8,
        "bucket_prefix": "restart",
        "training": {"maxSteps": 60, "globalBatchSize": 8, "learningRate": 0.01},
        "evaluation": {
            "metrics": ["WinRate"],
            "generation": {"maxNewTokens": 8},
            "rewardModel": {"uri": "s3://bucket/judge/"},
        },
    }
    gangs = []
    for attempt in range(2):
        held = {"validation": {"known": {"": rows}}}
        gang = make_measured_gang(tmp_path / str(attempt), s3, model, held, {"known": rows * 4}, **spec)
        gang.attempt_uid = f"attempt-{attempt}"
        make_judge(gang.work(0).judge)
        gangs.append(gang)
    first, second = gangs
    first.start()
    first.until(lambda: len(first.events("step")) >= 2)
    first.signal(0)
    assert [message.reason for message in first.wait()] == [Reason.PREEMPTED]
    message = second.run()
    assert message.resumed_from_step
    assert message.result
    assert 0 <= message.result.metrics["winRate"] <= 1
    assert not second.events("answers before training are not known")
