"""ORPO: learn the chosen sequence, and make the odds of its answer exceed the rejected one's; there is no reference."""

from typing import Any

import torch

from finetune_api.method import ORPO
from finetune_trainer.batches import IGNORED, Batch, Ints
from finetune_trainer.evaluation.loss import token_losses
from finetune_trainer.methods.losses import odds_ratio_losses, sequence_log_probs
from finetune_trainer.methods.preference import PairTrainer, Scored, tally_of_pairs


class ORPOTrainer(PairTrainer):
    def items(self, chosen_lengths: Ints) -> list[int]:
        return [len(chosen_lengths), int((chosen_lengths - 1).sum())]

    def scored(self, model: Any, batch: Batch) -> Scored:
        beta = (self.method.orpo or ORPO()).beta
        ids, labels, pairs = batch["input_ids"], batch["labels"], len(batch["labels"]) // 2
        logits = model(input_ids=ids).logits[:, -ids.shape[1] :]
        sums, counts = sequence_log_probs(logits, labels)
        chosen, rejected = (sums / counts.clamp(min=1)).chunk(2)
        # As in the reference implementations the prompt is learned too, with the chosen answer.
        real = torch.arange(ids.shape[1], device=ids.device) < batch["lengths"][:pairs, None]
        nll = token_losses(logits[:pairs], ids[:pairs].masked_fill(~real, IGNORED))
        odds = odds_ratio_losses(chosen, rejected, beta).sum()
        return Scored((odds, nll), tally_of_pairs(beta * chosen, beta * rejected))
