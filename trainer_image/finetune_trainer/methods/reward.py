"""A reward model: one score for a sequence, higher for the chosen answer of each pair (Bradley-Terry)."""

from typing import Any

from transformers import TrainingArguments

from finetune_api.method import Method, Reward
from finetune_trainer.batches import Batch, MicroBatches
from finetune_trainer.methods.losses import reward_losses
from finetune_trainer.methods.preference import PairTrainer, Scored, tally_of_pairs
from finetune_trainer.methods.scoring import Scoring


class RewardTrainer(PairTrainer):
    def __init__(self, model: Any, args: TrainingArguments, batches: MicroBatches, method: Method) -> None:
        super().__init__(model, args, batches, method)
        self._scoring = Scoring(model.config)

    def scored(self, model: Any, batch: Batch) -> Scored:
        centring = (self.method.reward or Reward()).center_rewards_coefficient
        chosen, rejected = self._scoring(model, batch).squeeze(-1).chunk(2)
        return Scored((reward_losses(chosen, rejected, centring).sum(),), tally_of_pairs(chosen, rejected))
