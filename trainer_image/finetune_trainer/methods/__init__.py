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
from finetune_trainer.methods.kto import KTOTrainer
from finetune_trainer.methods.orpo import ORPOTrainer
from finetune_trainer.methods.preference import PreferenceTrainer
from finetune_trainer.methods.reward import RewardTrainer
from finetune_trainer.methods.sft import SFTTrainer
from finetune_trainer.model import Task

PREFERENCE: dict[str, type[PreferenceTrainer]] = {
    "DPO": DPOTrainer,
    "KTO": KTOTrainer,
    "ORPO": ORPOTrainer,
    "Reward": RewardTrainer,
}


def task_of(method: Method, kind: Kind = "Tokens") -> Task:
    """What the model is for: it learns to answer, unless it learns to score (Reward) or to tell classes apart."""
    return "SEQ_CLS" if method.type == "Reward" or kind == "Classes" else "CAUSAL_LM"


def make_trainer(method: Method, model: Any, args: TrainingArguments, batches: MicroBatches) -> MethodTrainer:
    if method.type in PREFERENCE:
        return PREFERENCE[method.type](model, args, batches, method)
    if isinstance(batches, ClassBatches):
        return ClassifyTrainer(model, args, batches)
    return SFTTrainer(model, args, batches)
