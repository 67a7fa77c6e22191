"""GRPO and RLOO: several answers to each prompt, each judged by how much better than the others it scores.

GRPO: Shao et al. 2024 (arXiv 2402.03300), with the loss averaged over all tokens of the batch (Yu et al. 2025, arXiv
2503.14476), as TRL does it. RLOO, which is GRPO's `LeaveOneOut`: Ahmadian et al. 2024 (arXiv 2402.14740), where an
answer is one action, and the distance (KL) to the reference is taken off its score.
"""

from typing import Any, Literal

import torch

from finetune_api.method import GRPO
from finetune_trainer.batches import Batch
from finetune_trainer.methods.losses import clipped_losses
from finetune_trainer.methods.rollout import Answered, RolloutTrainer, log_probs, rows_of_tokens, sums_of_rows


class GRPOTrainer(RolloutTrainer):
    @property
    def grpo(self) -> GRPO:
        return self.method.grpo or GRPO()

    @property
    def leaves_one_out(self) -> bool:
        return self.grpo.advantage == "LeaveOneOut"

    def learnable(self, answered: list[Answered]) -> list[Batch]:
        grpo, batches, scores = self.grpo, [], []
        for part in answered:
            batch, score = part.batch, part.scores
            # The first of several updates needs it as well; where there is one alone, its ratio is 1 by definition.
            if grpo.iterations > 1 or (grpo.beta and self.leaves_one_out):
                batch = batch | {"old": log_probs(self.model_wrapped, batch, self.sampling.temperature)}
            if grpo.beta:
                reference = self.reference_log_probs(batch)
                if self.leaves_one_out:
                    drift = batch["old"] - reference
                    self.note_drift(part, drift)
                    score = score - grpo.beta * sums_of_rows(drift, batch["labels"])
                else:
                    batch = batch | {"reference": reference}
            batches.append(batch)
            scores.append(score)
        gained = group_advantages(self.everywhere(answered, scores).view(-1, grpo.generations), grpo.advantage)
        return [
            batch | {"advantages": gained.flatten()[part.places].float()}
            for batch, part in zip(batches, answered, strict=True)
        ]

    def loss(self, model: Any, batch: Batch, tokens: int, rows: int) -> torch.Tensor:
        grpo, labels = self.grpo, batch["labels"]
        now = log_probs(model, batch, self.sampling.temperature)
        moved = now - batch.get("old", now.detach())
        if self.leaves_one_out:
            losses = clipped_losses(sums_of_rows(moved, labels), batch["advantages"], grpo.clip_range)
            return losses.sum() / rows
        losses = clipped_losses(moved, batch["advantages"][rows_of_tokens(labels)], grpo.clip_range)
        if grpo.beta:
            # Without the ratio the gradient of the estimate is not that of the distance (DeepSeek-V3.2, 2512.02556).
            losses = losses + grpo.beta * torch.exp(moved) * distances(now, batch["reference"])
        return losses.sum() / tokens


def group_advantages(scores: torch.Tensor, kind: Literal["Normalized", "Centered", "LeaveOneOut"]) -> torch.Tensor:
    """(prompts, answers) from scores of that shape: less the group's mean, or the mean of the others."""
    count = scores.shape[1]
    if kind == "LeaveOneOut":
        return scores - (scores.sum(1, keepdim=True) - scores) / (count - 1)
    centred = scores - scores.mean(1, keepdim=True)
    return centred / (scores.std(1, keepdim=True) + 1e-4) if kind == "Normalized" else centred


def distances(now: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """An estimate of the KL divergence that is never negative, one per token (Schulman's k3)."""
    ratio = reference - now
    return torch.exp(ratio) - ratio - 1
