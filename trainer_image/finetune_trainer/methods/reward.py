"""A reward model: one score for a sequence, higher for the chosen answer of each pair (Bradley-Terry)."""

from typing import Any

import torch
from transformers import TrainingArguments

from finetune_api.method import Method, Reward
from finetune_trainer.batches import Batch, MicroBatches
from finetune_trainer.methods.losses import reward_losses
from finetune_trainer.methods.preference import PairTrainer, Scored, tally_of_pairs


class RewardTrainer(PairTrainer):
    """transformers scores the last token of a row that is not its padding token, so that token must pad the rows."""

    def __init__(self, model: Any, args: TrainingArguments, batches: MicroBatches, method: Method) -> None:
        super().__init__(model, args, batches, method)
        self._has_padding = model.config.get_text_config().pad_token_id is not None

    def scored(self, model: Any, batch: Batch) -> Scored:
        centring = (self.method.reward or Reward()).center_rewards_coefficient
        config = self.model.config.get_text_config()
        if not self._has_padding:
            config.pad_token_id = unused_at_end(batch)
        scores = model(input_ids=padded(batch, config.pad_token_id)).logits.squeeze(-1).float()
        chosen, rejected = scores.chunk(2)
        return Scored((reward_losses(chosen, rejected, centring).sum(),), tally_of_pairs(chosen, rejected))


def padded(batch: Batch, padding: int) -> torch.Tensor:
    """`input_ids` (rows, length) with this token wherever a row has ended."""
    ids = batch["input_ids"]
    ended = torch.arange(ids.shape[1], device=ids.device) >= batch["lengths"][:, None]
    return ids.masked_fill(ended, padding)


def unused_at_end(batch: Batch) -> int:
    """A token that is the last of no row: what may pad them where the model names none."""
    ends = set(batch["input_ids"].gather(1, batch["lengths"][:, None] - 1).flatten().tolist())
    return next(token for token in range(len(ends) + 1) if token not in ends)
