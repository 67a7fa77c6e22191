"""What PPO and GRPO need, and what does not go together with them: refused before anything runs."""

from collections.abc import Iterator, Sequence

from finetune_api.model import Problem
from finetune_api.stages import EffectiveStage, reward_stage


def problems(stages: Sequence[EffectiveStage]) -> Iterator[Problem]:
    for stage in stages:
        rollout = stage.spec.method.rollout
        if rollout is None or stage.generate:
            continue
        yield from _scores(stages, stage)
        yield from _reference(stage)
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


def _reference(stage: EffectiveStage) -> Iterator[Problem]:
    """What is compared with the model as it was needs that model, too."""
    spec, tuning, method = stage.spec, stage.spec.tuning, stage.spec.method
    if spec.base_model.adapter_uri:
        text = f"{method.type} starts from a whole model; publish the adapter merged and start from that model"
        yield Problem(("spec", "baseModel", "adapterUri"), text)
    if method.type == "GRPO" and not (method.grpo and method.grpo.beta):
        return
    why = f"{method.type} compares with the model as it was, which it finds by switching the adapter off"
    if not tuning.is_adapter:
        free = "; GRPO with beta 0 compares with nothing" if method.type == "GRPO" else ""
        yield Problem((*stage.path("tuning"), "type"), f"found {tuning.type}; {why}{free}")
    if tuning.lora and tuning.lora.initialization == "PiSSA":
        text = f"found PiSSA; it changes the base weights, and {why}: Default"
        yield Problem((*stage.path("tuning"), "lora", "initialization"), text)
