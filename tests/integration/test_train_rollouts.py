"""PPO, GRPO and RLOO by one worker and by two: real processes over gloo, on a tiny Llama that says numbers."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.asking import LARGE, PromptGang, make_numbers_model, make_prompt_gang
from support.preferring import make_preference_gang
from support.s3 import S3, running_s3

pytestmark = [pytest.mark.integration, pytest.mark.gang]

RULES = [{"name": "large", "expression": LARGE}]
METHODS: dict[str, dict[str, Any]] = {
    "PPO": {
        "type": "PPO",
        "ppo": {"rewardModel": {"uri": "s3://bucket/judge/"}, "klCoefficient": 0.02, "ppoEpochs": 2, "maxNewTokens": 6},
    },
    "GRPO": {
        "type": "GRPO",
        "grpo": {"rewards": RULES, "generations": 4, "iterations": 2, "beta": 0.01, "maxNewTokens": 6},
    },
    "RLOO": {
        "type": "GRPO",
        "grpo": {"rewards": RULES, "generations": 4, "advantage": "LeaveOneOut", "beta": 0.001, "maxNewTokens": 6},
    },
}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_numbers_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def judge(s3: S3, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter that a Reward job published: it prefers small numbers."""
    directory = tmp_path_factory.mktemp("judge")
    gang = make_preference_gang(
        directory, s3, model, {"type": "Reward"}, workers=1, micro_batch=16, bucket_prefix="judge",
        training={"maxSteps": 24, "learningRate": 0.03},
    )  # fmt: skip
    result = gang.run().result
    assert result
    assert result.metrics["preferenceAccuracy"] > 0.75
    return gang.published(directory / "published")


Run = tuple[PromptGang, dict[str, float], list[dict[str, float]]]


@pytest.fixture(scope="module")
def alone(s3: S3, model: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Of a method: what one worker learned, trained once."""
    return functools.cache(
        lambda method: trained(method, tmp_path_factory.mktemp("alone"), s3, model, judge, workers=1, micro_batch=32)
    )


def gang_of(method: str, directory: Path, s3: S3, model: Path, judge: Path, **places: Any) -> PromptGang:
    name = f"{method}-{places['workers']}-{places.get('strategy', 'DDP')}".lower()
    return make_prompt_gang(
        directory / name, s3, model, METHODS[method], bucket_prefix=name,
        reward_model=judge if method == "PPO" else None,
        training={"maxSteps": 16, "learningRate": 0.04, "globalBatchSize": 32},
        checkpoint={"interval": {"type": "Steps", "steps": 6}, "keep": 5}, **places,
    )  # fmt: skip


def trained(method: str, directory: Path, s3: S3, model: Path, judge: Path, **places: Any) -> Run:
    gang = gang_of(method, directory, s3, model, judge, **places)
    result = gang.run().result
    assert result
    return gang, result.metrics, gang.steps()


def agree(one: list[dict[str, float]], two: list[dict[str, float]], tolerance: float = 2e-3) -> None:
    for name in ("loss", "reward", "answer_tokens", "grad_norm"):
        assert [e[name] for e in one] == pytest.approx([e[name] for e in two], abs=tolerance, rel=tolerance), name


@pytest.mark.parametrize("method", METHODS)
def test_the_reward_rises_and_two_workers_learn_the_same(
    method: str, alone: Callable[[str], Run], s3: S3, model: Path, judge: Path, tmp_path: Path
) -> None:
    gang, one, steps = alone(method)
    assert one["meanReward"] > one["meanRewardBefore"] + (0.5 if method == "PPO" else 0.05)
    assert one["klBefore"] == pytest.approx(0, abs=1e-5)
    assert one["kl"] > 0.1
    assert 1 <= one["answerTokens"] <= 6
    _, two, others = trained(method, tmp_path, s3, model, judge, workers=2, micro_batch=8)
    agree(steps, others)
    for name in ("meanReward", "kl", "answerTokens"):
        assert {name: one[name]} == pytest.approx({name: two[name]}, abs=2e-2, rel=2e-2)

    published = gang.published(tmp_path / "published")
    assert "value_head" not in weights_of(published)
    worth = judged_by(judge, model) if method == "PPO" else mean_number
    assert mean_score(published, model, gang, worth) == pytest.approx(one["meanReward"], abs=1e-3)
    card = (published / "README.md").read_text()
    assert ("RLOO" if method == "RLOO" else method) in card


def test_zero_learns_what_one_worker_learns(
    alone: Callable[[str], Run], s3: S3, model: Path, judge: Path, tmp_path: Path
) -> None:
    _, one, steps = alone("PPO")
    for strategy in ("ZeRO2", "ZeRO3"):
        _, two, others = trained("PPO", tmp_path, s3, model, judge, workers=2, micro_batch=16, strategy=strategy)
        agree(steps, others)
        assert two["meanReward"] == pytest.approx(one["meanReward"], abs=2e-2)


def test_a_run_resumed_between_batches_of_answers_learns_the_same(
    alone: Callable[[str], Run], s3: S3, model: Path, judge: Path, tmp_path: Path
) -> None:
    """The value head is restored as well, and the answers are the same again."""
    gang, one, steps = alone("PPO")
    assert 6 in gang.checkpoints()
    prefix = f"{gang.config.scratch_uri}checkpoints/".removeprefix("s3://bucket/")
    for key in s3.keys("bucket", prefix):
        if "/step-00000006/" not in key:
            s3.client().delete_object(Bucket="bucket", Key=key)
    after = gang_of("PPO", tmp_path, s3, model, judge, workers=1, micro_batch=32)
    after.attempt_uid = "attempt-1"
    message = after.run()
    assert message.resumed_from_step == 6
    assert message.result
    agree(after.steps(), steps, tolerance=1e-4)
    assert message.result.metrics["meanReward"] == pytest.approx(one["meanReward"], abs=1e-4)


def weights_of(published: Path) -> str:
    from safetensors import safe_open

    with safe_open(published / "adapter_model.safetensors", "np") as file:
        return " ".join(file.keys())


def mean_score(published: Path, model: Path, gang: PromptGang, worth: Callable[[list[int], list[int]], float]) -> float:
    """Of the answers to the held-out prompts, by plain peft and transformers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune_trainer.methods.rollout import HELD_OUT
    from finetune_trainer.methods.sampling import Sampling, draws, sample

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), published).eval()
    prompts = [np.array(row["input_ids"]) for row in gang.rows["validation"]]
    chance = draws((gang.config.spec.training.seed, HELD_OUT), np.arange(len(prompts)), 6)
    answers = sample(loaded, prompts, chance, Sampling(1.0, 6, (0, 1, 2), True, False), torch.device("cpu"))
    return float(np.mean([worth(p.tolist(), a.tolist()) for p, a in zip(prompts, answers, strict=True)]))


def mean_number(prompt: list[int], answer: list[int]) -> float:
    words = [token for token in answer if token > 2]
    return sum(words) / max(1, len(words)) / 64


def judged_by(judge: Path, model: Path) -> Callable[[list[int], list[int]], float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    loaded = PeftModel.from_pretrained(base, judge).eval()

    def worth(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            return float(loaded(input_ids=torch.tensor([prompt + answer])).logits)

    return worth
