"""What PPO and GRPO need, refused before anything runs where it is not there."""

from collections.abc import Iterator, Sequence

from finetune_api.model import Problem
from finetune_api.stages import EffectiveStage, reward_stage


def problems(stages: Sequence[EffectiveStage]) -> Iterator[Problem]:
    for stage in stages:
        rollout = stage.spec.method.rollout
        if rollout is None or stage.generate:
            continue
        yield from _scores(stages, stage)
        if rollout.reward_model and not rollout.reward_model.uri.startswith("s3://"):
            path = (*stage.path("method"), stage.spec.method.type.lower(), "rewardModel", "uri")
            yield Problem(path, f"found {rollout.reward_model.uri!r}; this version supports s3:// only")


def _scores(stages: Sequence[EffectiveStage], stage: EffectiveStage) -> Iterator[Problem]:
    """Something must say what an answer is worth."""
    method = stage.spec.method
    rollout = method.rollout
    rules = method.grpo.rewards if method.type == "GRPO" and method.grpo else []
    if rollout is None or rollout.reward_model or rules or reward_stage(stages, stage.number) is not None:
        return
    path, means = (*stage.path("method"), method.type.lower()), "its uri, or a stage with method Reward before this one"
    if method.type == "PPO":
        yield Problem((*path, "rewardModel"), f"found none; PPO learns from the scores of a reward model: {means}")
    else:
        text = f"found none; GRPO learns from expressions, a reward model (rewardModel: {means}), or both"
        yield Problem((*path, "rewards"), text)
