"""What PPO and GRPO need before anything runs: something that scores answers."""

from typing import Any

import pytest

from finetune_api import job
from finetune_api.model import format_path
from finetune_api.support import unsupported
from support.manifests import job_manifest

PROMPTS = [{"name": "p", "uri": "s3://data/p.jsonl", "format": "PromptOnly"}]
PAIRS = [{"name": "r", "uri": "s3://data/r.jsonl", "format": "Preference"}]
JUDGED = {"rewardModel": {"uri": "s3://models/judge/"}}
RULED = {"rewards": [{"name": "short", "expression": "-words(completion)"}]}


def problems(method: dict[str, Any], **spec: Any) -> list[str]:
    manifest = job_manifest(**{"method": method, "datasets": PROMPTS} | spec)
    return [f"{format_path(p.path)}: {p.message}" for p in unsupported(job.parse(manifest).spec)]


@pytest.mark.parametrize(
    "method",
    [
        {"type": "PPO", "ppo": JUDGED},
        {"type": "GRPO", "grpo": JUDGED},
        {"type": "GRPO", "grpo": RULED},
        {"type": "GRPO", "grpo": JUDGED | RULED | {"advantage": "LeaveOneOut", "beta": 0.1}},
    ],
)
def test_a_method_with_something_that_scores_is_accepted(method: dict[str, Any]) -> None:
    assert problems(method) == []


@pytest.mark.parametrize(
    ("method", "spec", "expected"),
    [
        ({"type": "PPO"}, {}, "spec.method.ppo.rewardModel: found none; PPO learns from the scores of a reward model"),
        ({"type": "GRPO"}, {}, "spec.method.grpo.rewards: found none; GRPO learns from expressions, a reward model"),
        (
            {"type": "PPO", "ppo": {"rewardModel": {"uri": "hf://org/judge@v1"}}},
            {},
            "spec.method.ppo.rewardModel.uri: found 'hf://org/judge@v1'; this version supports s3:// only",
        ),
    ],
)
def test_what_is_missing_is_named(method: dict[str, Any], spec: dict[str, Any], expected: str) -> None:
    (found,) = problems(method, **spec)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    "spec",
    [
        {"tuning": {"type": "Full"}},
        {"tuning": {"type": "LoRA", "lora": {"initialization": "PiSSA"}}},
        {"baseModel": {"uri": "s3://models/base/", "adapterUri": "s3://adapters/a/"}},
    ],
)
def test_whatever_is_tuned_has_a_reference(spec: dict[str, Any]) -> None:
    assert problems({"type": "PPO", "ppo": JUDGED}, **spec) == []


def test_the_reward_stage_before_judges() -> None:
    reward = {"name": "reward", "method": {"type": "Reward"}, "datasets": PAIRS}
    ppo = {"name": "ppo", "method": {"type": "PPO"}, "datasets": PROMPTS}
    assert problems({"type": "SFT"}, stages=[reward, ppo]) == []
    (found,) = problems({"type": "SFT"}, stages=[ppo, reward])
    assert found.startswith("spec.stages[0].method.ppo.rewardModel: found none")
