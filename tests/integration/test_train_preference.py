"""Each method that learns from preferences, by one worker and by two: real processes over gloo, on a tiny Llama."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.dataset import Holdout
from finetune_api.run import PreparedData
from finetune_trainer.prepare import prepare
from finetune_trainer.pull import pull
from finetune_trainer.workdir import WorkDir
from support.gang import make_tiny_model
from support.preferring import PreferenceGang, make_preference_gang
from support.s3 import S3, running_s3
from support.tiny import make_tiny_model as make_model_with_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.gang]

METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"type": "DPO", "dpo": {"beta": 0.5}},
    "KTO": {"type": "KTO", "kto": {"beta": 0.5, "undesirableWeight": 0.8}},
    "ORPO": {"type": "ORPO", "orpo": {"beta": 5}},
    "Reward": {"type": "Reward", "reward": {"centerRewardsCoefficient": 0.01}},
}
FIGURES = {"evalLoss", "rewardMargin", "preferenceAccuracy", "chosenReward", "rejectedReward"}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


Run = tuple[PreferenceGang, dict[str, float], list[dict[str, float]]]


@pytest.fixture(scope="module")
def alone(s3: S3, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Of a method: what one worker learned, trained once."""
    return functools.cache(
        lambda method: trained(method, tmp_path_factory.mktemp("alone"), s3, model, workers=1, micro_batch=16)
    )


def trained(method: str, directory: Path, s3: S3, model: Path, **places: Any) -> Run:
    """A finished gang, its final figures, and those of each step."""
    name = f"{method}-{places['workers']}-{places.get('strategy', 'DDP')}".lower()
    training = {"maxSteps": 8, "learningRate": 0.03}
    gang = make_preference_gang(
        directory / name, s3, model, METHODS[method], bucket_prefix=name, training=training, **places
    )
    result = gang.run().result
    assert result
    lines = s3.get(f"{gang.config.output_uri}{gang.attempt_uid}/metrics.jsonl").decode().splitlines()
    return gang, result.metrics, [json.loads(line) for line in lines[:-1]]


def agree(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    for name in ("loss", "reward_margin", "preference_accuracy", "grad_norm"):
        assert [e[name] for e in one] == pytest.approx([e[name] for e in two], abs=1e-3, rel=1e-3), name


@pytest.mark.parametrize("method", METHODS)
def test_a_method_learns_what_is_preferred_and_two_workers_learn_the_same(
    method: str, alone: Callable[[str], Run], s3: S3, model: Path, tmp_path: Path
) -> None:
    gang, one, steps = alone(method)
    assert one["rewardMargin"] > one["rewardMarginBefore"] + 0.5
    assert one["preferenceAccuracy"] > one["preferenceAccuracyBefore"]
    assert one["evalLoss"] < one["evalLossBefore"]
    if method in ("DPO", "KTO"):
        # Before the first step the policy is the reference.
        assert one["rewardMarginBefore"] == pytest.approx(0, abs=1e-6)
        assert one["preferenceAccuracyBefore"] == 0.5
        assert one["evalLossBefore"] == pytest.approx(math.log(2) if method == "DPO" else 0.45, abs=1e-5)
    _, two, others = trained(method, tmp_path, s3, model, workers=2, micro_batch=4)
    agree(steps, others)
    for name in FIGURES:
        assert {name: one[name]} == pytest.approx({name: two[name]}, abs=5e-3)
        assert one[f"{name}Before"] == pytest.approx(two[f"{name}Before"], abs=1e-4)

    published = gang.published(tmp_path / "published")
    assert margin(published, model, gang, method) == pytest.approx(one["rewardMargin"], abs=1e-3)
    card = (published / "README.md").read_text()
    assert f"| Method | {method}" in card
    assert "| Validation reward margin |" in card
    assert gang.events("step")[-1]["reward_margin"] == pytest.approx(steps[-1]["reward_margin"], abs=1e-4)


def test_zero_learns_what_one_worker_learns(alone: Callable[[str], Run], s3: S3, model: Path, tmp_path: Path) -> None:
    _, one, steps = alone("DPO")
    _, two, others = trained("DPO", tmp_path, s3, model, workers=2, micro_batch=8, strategy="ZeRO2")
    agree(steps, others)
    assert two["rewardMargin"] == pytest.approx(one["rewardMargin"], abs=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_what_prepare_writes_is_learned(method: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model_with_tokenizer(tmp_path / "model")
    for path in base.iterdir():
        s3.put(f"s3://bucket/models/tiny/{path.name}", path.read_bytes())
    rows = [{"prompt": f"question {i}", "chosen": " plain words", "rejected": f" the dog {i}"} for i in range(40)]
    s3.put("s3://bucket/data/pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    gang = make_preference_gang(
        tmp_path,
        s3,
        base,
        METHODS[method],
        bucket_prefix=f"{method}-prepared".lower(),
        workers=1,
        micro_batch=16,
        training={"maxSteps": 2},
    )
    spec = gang.config.spec.model_copy(update={"validation": Holdout(fraction=0.2)})
    gang.config = gang.config.model_copy(update={"spec": spec})
    for name, value in (s3.environment | {"FINETUNE_WORK_DIR": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    pod = WorkDir(tmp_path / "pulled")
    monkeypatch.setenv("FINETUNE_ATTEMPT_UID", "attempt-0")
    pull(gang.config.model_copy(update={"prepared": prepare(gang.config).prepared}), pod)
    gang.prepared, gang.shards = PreparedData.model_validate_json(pod.index.read_bytes()), pod
    result = gang.run().result
    assert result
    assert result.metrics.keys() >= FIGURES


def margin(published: Path, model: Path, gang: PreferenceGang, method: str) -> float:
    """The reward margin of the held-out rows, by plain peft and transformers, one row at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    base = (
        AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        if method == "Reward"
        else AutoModelForCausalLM.from_pretrained(model)
    )
    loaded = PeftModel.from_pretrained(base, published).eval()

    def log_prob(ids: list[int]) -> float:
        known = loaded(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return float(sum(known[place, token] for place, token in enumerate(ids[1:]) if place >= 2))

    def reward(ids: list[int]) -> float:
        if method == "Reward":
            return float(loaded(input_ids=torch.tensor([ids])).logits)
        if method == "ORPO":
            return 5 * log_prob(ids) / (len(ids) - 3)
        with loaded.disable_adapter():
            reference = log_prob(ids)
        return 0.5 * (log_prob(ids) - reference)

    rewards: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for row in gang.rows["validation"]:
            rewards[row.get("desirable", True)].append(reward(row["input_ids"]))
            if "rejected_input_ids" in row:
                rewards[False].append(reward(row["rejected_input_ids"]))
    chosen, rejected = (sum(values) / len(values) for values in (rewards[True], rewards[False]))
    return chosen - rejected
