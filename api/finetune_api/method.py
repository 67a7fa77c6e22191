"""How the model is taught: spec.method."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune_api.model import ApiModel, Flag, Label, ModelUri
from finetune_api.texts import ExpressionText

Coefficient = Annotated[float, Field(ge=0, le=10)]
ClipRange = Annotated[float, Field(gt=0, le=1)]
AnswerTokens = Annotated[int, Field(ge=1, le=65536)]
Temperature = Annotated[float, Field(gt=0, le=10)]


class ModelRef(ApiModel):
    uri: ModelUri


class SFT(ApiModel):
    loss: Literal["Completion", "Assistant", "All"] = "Completion"
    """What is learned: completions and the last assistant turn, every assistant turn, or every token."""
    packing: Flag = False
    """Put several examples in one row; none attends to another."""


class DPO(ApiModel):
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    loss: Literal["Sigmoid", "Hinge", "IPO"] = "Sigmoid"


class KTO(ApiModel):
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    desirable_weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0, le=100)] = 1.0


class ORPO(ApiModel):
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1


class Reward(ApiModel):
    center_rewards_coefficient: Coefficient = 0.0


class PPO(ApiModel):
    reward_model: ModelRef | None = None
    """A reward model, or the adapter of one on this job's base model; absent: that of the Reward stage before."""
    kl_coefficient: Coefficient = 0.05
    clip_range: ClipRange = 0.2
    value_clip_range: ClipRange = 0.2
    value_coefficient: Coefficient = 0.1
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    ppo_epochs: Annotated[int, Field(ge=1, le=100)] = 4
    """Updates from one batch of answers."""
    max_new_tokens: AnswerTokens = 128
    temperature: Temperature = 1.0

    @property
    def updates(self) -> int:
        return self.ppo_epochs

    @property
    def answers(self) -> int:
        """To each prompt."""
        return 1


class RewardExpression(ApiModel):
    """A rule that scores an answer; the weighted scores are added up."""

    name: Label
    expression: ExpressionText
    """A sandboxed Jinja expression over `prompt`, `completion` and `reference` that gives a number or a truth value."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0


class GRPO(ApiModel):
    """Group-relative policy optimisation; with `LeaveOneOut` it is RLOO."""

    reward_model: ModelRef | None = None
    """As for PPO; may be left out where there are rewards."""
    rewards: Annotated[
        list[RewardExpression],
        Field(
            max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
    ] = []
    generations: Annotated[int, Field(ge=2, le=128)] = 8
    """Answers to each prompt."""
    advantage: Literal["Normalized", "Centered", "LeaveOneOut"] = "Normalized"
    """A score less its group's mean, divided by its group's deviation or not; or less the mean of the others."""
    beta: Coefficient = 0.0
    """How much the distance (KL) from the model as it was before costs."""
    clip_range: ClipRange = 0.2
    iterations: Annotated[int, Field(ge=1, le=100)] = 1
    """Updates from one batch of answers."""
    max_new_tokens: AnswerTokens = 128
    temperature: Temperature = 1.0

    @property
    def updates(self) -> int:
        return self.iterations

    @property
    def answers(self) -> int:
        """To each prompt."""
        return self.generations


class Method(ApiModel):
    union: ClassVar = {
        "SFT": "sft",
        "DPO": "dpo",
        "KTO": "kto",
        "ORPO": "orpo",
        "Reward": "reward",
        "PPO": "ppo",
        "GRPO": "grpo",
    }
    type: Literal["SFT", "DPO", "KTO", "ORPO", "Reward", "PPO", "GRPO"] = "SFT"
    sft: SFT | None = None
    dpo: DPO | None = None
    kto: KTO | None = None
    orpo: ORPO | None = None
    reward: Reward | None = None
    ppo: PPO | None = None
    grpo: GRPO | None = None

    @property
    def rollout(self) -> PPO | GRPO | None:
        """The method's settings where it learns from the model's own answers; None elsewhere."""
        match self.type:
            case "PPO":
                return self.ppo or PPO()
            case "GRPO":
                return self.grpo or GRPO()
            case _:
                return None
