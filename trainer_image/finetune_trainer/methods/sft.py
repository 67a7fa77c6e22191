"""Supervised fine-tuning: the loss of a step is the mean over the learned tokens of the whole global batch."""

from typing import Any

import torch

from finetune_trainer.batches import Batch, Examples
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Groups
from finetune_trainer.evaluation.loss import evaluate, figures_of
from finetune_trainer.logits import learned_logits
from finetune_trainer.methods.base import MethodTrainer


class SFTTrainer(MethodTrainer):
    def measure(self, data: Examples, ranks: Ranks, batch_size: int, groups: Groups) -> dict[str, float]:
        return groups.told(evaluate(self.model_wrapped, data, groups, ranks, batch_size), figures_of)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        labels = inputs.pop("labels")
        logits, targets = learned_logits(model, inputs, labels)
        assert num_items_in_batch is not None
        # DDP and ZeRO average gradients over the ranks; the denominator is the whole batch's already.
        scale = self.batches.world_size / int(num_items_in_batch)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") * scale
