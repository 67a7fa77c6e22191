"""KTO: answers with a verdict; good ones rise above a reference point, bad ones fall below it.

The reference point is how far the policy has moved from the reference on answers to other prompts. It is estimated over
the whole global batch, before its first micro-batch is learned.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from finetune_api.method import KTO
from finetune_trainer.batches import Batch
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Groups
from finetune_trainer.evaluation.loss import batches_of
from finetune_trainer.methods.losses import kl_estimate, kto_losses
from finetune_trainer.methods.preference import Part, PreferenceTrainer, Scored
from finetune_trainer.preferences import UnpairedBatches, collate_unpaired, others_of
from finetune_trainer.shards import Unpaired


class KTOTrainer(PreferenceTrainer):
    batches: UnpairedBatches
    kl: torch.Tensor
    """The reference point of the batch that is being learned."""

    def scored(self, model: Any, batch: Batch) -> Scored:
        kto, desirable = self.method.kto or KTO(), batch["desirable"]
        ratios, _ = self.log_ratios(model, batch["input_ids"], batch["labels"])
        losses = kto_losses(ratios, desirable, self.kl, kto.beta, kto.desirable_weight, kto.undesirable_weight)
        return Scored((losses.sum(),), tally_of_verdicts(kto.beta * ratios, kto.beta * self.kl, desirable))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if items is not None:
            total = self._drift(batches, device)
            dist.all_reduce(total)
            self.kl = kl_estimate(total, int(items[0]))
        return batches, items

    def _drift(self, batches: list[Batch], device: torch.device) -> torch.Tensor:
        """The log-ratios of the other rows' answers, summed over this rank's micro-batches."""
        total, was_training = torch.zeros((), device=device), self.model.training
        self.model.eval()
        with torch.no_grad():
            for batch in batches:
                ids, labels = batch.pop("kl_input_ids").to(device), batch.pop("kl_labels").to(device)
                total += self.log_ratios(self.model_wrapped, ids, labels)[0].sum()
        self.model.train(was_training)
        return total

    def measure(self, data: Unpaired, ranks: Ranks, batch_size: int, groups: Groups) -> dict[str, float]:
        """The reference point is that of all held-out rows together."""
        order = np.argsort(-data.examples.lengths, kind="stable")
        other, max_length = others_of(order), self.batches.max_length
        plan = batches_of(data.examples, ranks.rank, ranks.world_size, batch_size, groups)
        parts = [
            Part(
                collate_unpaired(data, ids, np.array([other[int(i)] for i in ids]), max_length),
                [len(ids)],
                counts,
                int(groups.leaf[ids[0]]),
            )
            for ids, counts in plan
        ]
        # A batch that only keeps the ranks in step is computed, and counts nothing.
        drift = [float(self._drift([part.batch], ranks.device)) * part.counts for part in parts]
        (total,) = ranks.sum([sum(drift)])
        self.kl = kl_estimate(torch.tensor(total, device=ranks.device), len(order))
        return self._figures(iter(parts), ranks, groups)


def tally_of_verdicts(rewards: torch.Tensor, reference: torch.Tensor, desirable: torch.Tensor) -> torch.Tensor:
    """Rewards of each row (rows,) as a tally; right is a good one above the reference point or a bad one below it."""
    rewards, good = rewards.detach().float(), desirable.float()
    above = (rewards > reference).float() + 0.5 * (rewards == reference).float()
    bad, count = 1 - good, good.new_tensor(float(len(good)))
    right = (above * good + (1 - above) * bad).sum()
    return torch.stack([(rewards * good).sum(), good.sum(), (rewards * bad).sum(), bad.sum(), right, count])
