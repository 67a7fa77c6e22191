"""The table of methods: spec.method.type -> the Trainer that does it."""

from finetune_trainer.methods.sft import SFTTrainer

TRAINERS = {"SFT": SFTTrainer}
