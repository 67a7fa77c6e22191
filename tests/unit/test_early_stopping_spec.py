"""training.earlyStopping before anything runs: what may be watched, and what it needs."""

from typing import Any

import pytest

from finetune_api import job
from finetune_api.model import format_path
from finetune_api.support import unsupported
from finetune_api.watched import Watched, watched
from support.manifests import job_manifest

VALIDATION = {"fraction": 0.1}


@pytest.mark.parametrize(
    ("metric", "method", "figure", "lower"),
    [
        ("eval_loss", "SFT", "evalLoss", True),
        ("evalLoss", "SFT", "evalLoss", True),
        ("loss", "SFT", "evalLoss", True),
        ("eval_perplexity", "SFT", "perplexity", True),
        ("rewardMargin", "DPO", "rewardMargin", False),
        ("eval_rewards/margins", "DPO", "rewardMargin", False),
        ("eval_rewards/accuracies", "KTO", "preferenceAccuracy", False),
        ("accuracy", "Reward", "preferenceAccuracy", False),
        ("meanReward", "PPO", "meanReward", False),
        ("kl", "GRPO", "kl", True),
    ],
)
def test_a_figure_has_many_names(metric: str, method: str, figure: str, lower: bool) -> None:
    kind = {"SFT": "Tokens", "KTO": "Unpaired", "PPO": "Prompts", "GRPO": "Prompts"}.get(method, "Pairs")
    assert watched(metric, method, kind) == Watched(figure, lower)  # type: ignore[arg-type]


def test_classes_are_measured_by_more() -> None:
    assert watched("eval_f1", "SFT", "Classes") == Watched("f1", lower=False)
    assert watched("accuracy", "SFT", "Classes") == Watched("accuracy", lower=False)
    assert watched("accuracy", "SFT", "Tokens") is None


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        (
            {"training": {"earlyStopping": {}}},
            "spec.training.earlyStopping",
            "found metric eval_loss; there is no validation data: say which with spec.validation",
        ),
        (
            {"training": {"earlyStopping": {"metric": "rouge"}}, "validation": VALIDATION},
            "spec.training.earlyStopping.metric",
            "found rouge; SFT measures evalLoss, perplexity, tokenAccuracy while it trains",
        ),
        (
            {"training": {"earlyStopping": {}}, "validation": VALIDATION, "method": {"type": "PPO"}},
            "spec.training.earlyStopping.metric",
            "found eval_loss; PPO measures meanReward, kl",
        ),
        (
            {"evaluation": {"everySteps": 10}},
            "spec.evaluation.everySteps",
            "found 10; there is no validation data",
        ),
        (
            {
                "stages": [{"name": "a"}, {"name": "b", "training": {"earlyStopping": {"metric": "bleu"}}}],
                "validation": VALIDATION,
            },
            "spec.stages[1].training.earlyStopping.metric",
            "found bleu",
        ),
    ],
)
def test_what_cannot_be_watched_is_refused(changes: dict[str, Any], path: str, words: str) -> None:
    problems = {format_path(p.path): p.message for p in unsupported(job.parse(job_manifest(**changes)).spec)}
    assert words in problems[path]


def test_early_stopping_with_validation_data_is_taken() -> None:
    changes = {"training": {"earlyStopping": {"metric": "eval_loss"}}, "validation": VALIDATION}
    assert unsupported(job.parse(job_manifest(**changes)).spec) == []
