"""The table of methods: spec.method.type -> the Trainer that does it."""

from typing import Any

from transformers import TrainingArguments

from finetune_api.formats import Kind
from finetune_api.method import Method
from finetune_trainer.batches import MicroBatches
from finetune_trainer.labelled import ClassBatches
from finetune_trainer.methods.base import MethodTrainer
from finetune_trainer.methods.classify import ClassifyTrainer
from finetune_trainer.methods.dpo import DPOTrainer
from finetune_trainer.methods.grpo import GRPOTrainer
from finetune_trainer.methods.kto import KTOTrainer
from finetune_trainer.methods.orpo import ORPOTrainer
from finetune_trainer.methods.ppo import PPOTrainer
from finetune_trainer.methods.preference import PreferenceTrainer
from finetune_trainer.methods.reward import RewardTrainer
from finetune_trainer.methods.rollout import RolloutTrainer
from finetune_trainer.methods.sft import SFTTrainer
from finetune_trainer.model import Task
from finetune_trainer.prompting import PromptBatches
from finetune_trainer.rewards import Rewards

PREFERENCE: dict[str, type[PreferenceTrainer]] = {
    "DPO": DPOTrainer,
    "KTO": KTOTrainer,
    "ORPO": ORPOTrainer,
    "Reward": RewardTrainer,
}
ROLLOUT: dict[str, type[RolloutTrainer]] = {"PPO": PPOTrainer, "GRPO": GRPOTrainer}


def task_of(method: Method, kind: Kind = "Tokens") -> Task:
    """What the model is for: it learns to answer, unless it learns to score (Reward) or to tell classes apart."""
    return "SEQ_CLS" if method.type == "Reward" or kind == "Classes" else "CAUSAL_LM"


def make_trainer(
    method: Method, model: Any, args: TrainingArguments, batches: MicroBatches, rewards: Rewards | None = None
) -> MethodTrainer:
    """`rewards`: what the model's own answers are worth, where it learns from them."""
    if isinstance(batches, PromptBatches):
        assert rewards
        return ROLLOUT[method.type](model, args, batches, method, rewards)
    if method.type in PREFERENCE:
        return PREFERENCE[method.type](model, args, batches, method)
    if isinstance(batches, ClassBatches):
        return ClassifyTrainer(model, args, batches)
    return SFTTrainer(model, args, batches)
