"""What the methods that learn from preferences share: the reference, the figures, and their sums over all ranks."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainingArguments

from finetune_api.failures import FineTuneError, Reason
from finetune_api.method import Method
from finetune_trainer.batches import Batch, Ints, MicroBatches
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Floats, Groups
from finetune_trainer.evaluation.loss import batches_of
from finetune_trainer.logits import learned_logits
from finetune_trainer.methods.base import MethodTrainer
from finetune_trainer.methods.losses import row_log_probs
from finetune_trainer.methods.reference import reference_of
from finetune_trainer.preferences import collate_pairs
from finetune_trainer.shards import Pairs

TALLY = 6
"""Sum of chosen rewards, their number, sum of rejected rewards, their number, right verdicts, verdicts."""


class Scored(NamedTuple):
    """A micro-batch: sums whose quotients with the denominators of a `num_items` add up to the loss; and its tally."""

    sums: tuple[torch.Tensor, ...]
    tally: torch.Tensor
    """(TALLY,)"""


class Part(NamedTuple):
    """A batch of held-out examples, all of one leaf of their groups."""

    batch: Batch
    items: list[int]
    """Its denominators."""
    counts: bool
    leaf: int


class PreferenceTrainer(MethodTrainer):
    def __init__(self, model: Any, args: TrainingArguments, batches: MicroBatches, method: Method) -> None:
        super().__init__(model, args, batches)
        self.method = method
        self.reference = reference_of(model, keeps=False)
        self._tally = torch.zeros(TALLY, dtype=torch.float64)

    def scored(self, model: Any, batch: Batch) -> Scored:
        raise NotImplementedError

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        scored = self.scored(model, inputs)
        self._tally += scored.tally.detach().double().cpu()
        assert num_items_in_batch is not None
        # DDP and ZeRO average gradients over the ranks; the denominators are the whole batch's already.
        return total_loss(scored.sums, num_items_in_batch.tolist()) * self.batches.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures of the examples that were learned since the last line. Collective, as the Trainer's is."""
        if "loss" in logs:
            device = self.args.device
            total = self._tally.float().to(device)
            dist.all_reduce(total)
            found = figures_of(total.tolist())
            logs |= {"reward_margin": found["rewardMargin"], "preference_accuracy": found["preferenceAccuracy"]}
            self._tally.zero_()
        super().log(logs, start_time)

    def log_ratios(self, model: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of each row's answer: log-probability less the reference's, and tokens; both (rows,)."""
        # First the reference: DDP expects a backward pass right after the last forward pass.
        with self.as_reference():
            reference, _ = row_log_probs(*learned_logits(model, {"input_ids": input_ids}, labels), labels)
        policy, counts = row_log_probs(*learned_logits(model, {"input_ids": input_ids}, labels), labels)
        return policy - reference, counts

    def _held_out(self, parts: Iterator[Part], ranks: Ranks, groups: Groups) -> Floats:
        """Sums, denominators and tally over all ranks' parts: (leaves, 2 * sums + TALLY)."""
        model, was_training = self.model_wrapped, self.model.training
        model.eval()
        total: Floats | None = None
        with torch.no_grad():
            for part in parts:
                found = self.scored(model, {name: tensor.to(ranks.device) for name, tensor in part.batch.items()})
                values = np.array([*(float(one) for one in found.sums), *part.items, *found.tally.tolist()])
                if total is None:
                    total = np.zeros((groups.leaves, len(values)))
                total[part.leaf] += values * part.counts
        model.train(was_training)
        assert total is not None
        return np.array(ranks.sum(total.flatten().tolist())).reshape(total.shape)

    def _figures(self, parts: Iterator[Part], ranks: Ranks, groups: Groups) -> dict[str, float]:
        found = groups.told(self._held_out(parts, ranks, groups), _figures_of_sums)
        if not math.isfinite(found["evalLoss"]):
            raise FineTuneError(Reason.DIVERGED, "the loss on the validation data is not a number")
        return found


class PairTrainer(PreferenceTrainer):
    """A method that learns from pairs, which go through the model as one batch of twice as many rows."""

    def measure(self, data: Pairs, ranks: Ranks, batch_size: int, groups: Groups) -> dict[str, float]:
        def part(ids: Ints, counts: bool) -> Part:
            items = self.items(data.chosen.lengths[ids])
            return Part(collate_pairs(data, ids), items, counts, int(groups.leaf[ids[0]]))

        plan = batches_of(data.chosen, ranks.rank, ranks.world_size, batch_size, groups)
        return self._figures((part(ids, counts) for ids, counts in plan), ranks, groups)

    def items(self, chosen_lengths: Ints) -> list[int]:
        """The denominators of these pairs."""
        return [len(chosen_lengths)]


def total_loss(sums: tuple[torch.Tensor, ...], items: list[int]) -> torch.Tensor:
    """Each sum over its own denominator, added up; one sum alone leaves the second denominator unused."""
    loss = sums[0] / max(1, items[0])
    for part, count in zip(sums[1:], items[1:], strict=False):
        loss = loss + part / max(1, count)
    return loss


def tally_of_pairs(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Rewards of each pair (pairs,) as a tally; a tie is half right."""
    chosen, rejected = chosen.detach().float(), rejected.detach().float()
    count = torch.tensor(float(len(chosen)), device=chosen.device)
    right = (chosen > rejected).float().sum() + 0.5 * (chosen == rejected).float().sum()
    return torch.stack([chosen.sum(), count, rejected.sum(), count, right, count])


def _figures_of_sums(values: list[float]) -> dict[str, float]:
    """`values`: sums, as many denominators, a tally."""
    parts = (len(values) - TALLY) // 2
    sums, items = values[:parts], values[parts : 2 * parts]
    loss = sum(part / max(1.0, count) for part, count in zip(sums, items, strict=True))
    return {"evalLoss": loss} | figures_of(values[-TALLY:])


def figures_of(tally: list[float]) -> dict[str, float]:
    chosen, rejected, right = (
        tally[place] / tally[place + 1] if tally[place + 1] else 0.0 for place in range(0, TALLY, 2)
    )
    return {
        "rewardMargin": chosen - rejected,
        "preferenceAccuracy": right,
        "chosenReward": chosen,
        "rejectedReward": rejected,
    }
