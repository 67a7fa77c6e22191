"""The loss on held-out examples: exact, each token counting once whatever the number of ranks."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.batches import IGNORED, Examples, Ints, collate
from finetune_trainer.distributed import Ranks


class Evaluation(NamedTuple):
    loss: float
    """Mean cross-entropy per token, in nats."""
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def batches_of(examples: Examples, rank: int, world_size: int, batch_size: int) -> list[tuple[Ints, bool]]:
    """This rank's batches of example ids, longest first, and whether each counts.

    Every rank gets the same number of them, since a forward pass may be a collective (ZeRO-3): who has too few repeats
    one that does not count.
    """
    order = np.argsort(-examples.lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rounds = -(-len(batches) // world_size)
    mine = batches[rank::world_size]
    return [(batch, True) for batch in mine] + [(batches[-1], False)] * (rounds - len(mine))


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy of the labelled tokens, in float32; only their logits are converted."""
    targets = labels[:, 1:]
    kept = targets != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction="sum")


def evaluate(model: Any, examples: Examples, ranks: Ranks, batch_size: int) -> Evaluation:
    """Collective. Raises Diverged where the loss is not a number."""
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for ids, counts in batches_of(examples, ranks.rank, ranks.world_size, batch_size):
            batch = collate(examples, [ids[i : i + 1] for i in range(len(ids))], packed=False)
            labels = batch["labels"].to(ranks.device)
            logits = model(input_ids=batch["input_ids"].to(ranks.device)).logits
            if counts:
                total += float(token_losses(logits, labels))
                tokens += int((labels[:, 1:] != IGNORED).sum())
    model.train(was_training)
    total, counted = ranks.sum([total, float(tokens)])
    if not math.isfinite(total):
        raise FineTuneError(Reason.DIVERGED, "the loss on the validation data is not a number")
    return Evaluation(total / max(1.0, counted), int(counted))
