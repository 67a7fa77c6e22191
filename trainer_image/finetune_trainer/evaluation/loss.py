"""The loss on held-out examples: exact, each token counting once whatever the number of ranks."""

import math
from typing import Any

import numpy as np
import torch

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.batches import IGNORED, Examples, Ints, collate
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Floats, Groups
from finetune_trainer.logits import learned_logits

SUMS = 3
"""Cross-entropy in nats, tokens, tokens that were the likeliest."""


def batches_of(
    examples: Examples, rank: int, world_size: int, batch_size: int, groups: Groups | None = None
) -> list[tuple[Ints, bool]]:
    """This rank's batches of example ids, longest first, and whether each counts.

    Every rank gets the same number of them, since a forward pass may be a collective (ZeRO-3): who has too few repeats
    one that does not count. With `groups` the examples of a batch are all of one leaf.
    """
    order = np.argsort(-examples.lengths, kind="stable")
    parts = [order] if groups is None else [order[groups.leaf[order] == leaf] for leaf in range(groups.leaves)]
    batches = [part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size)]
    rounds = -(-len(batches) // world_size)
    mine = batches[rank::world_size]
    return [(batch, True) for batch in mine] + [(batches[-1], False)] * (rounds - len(mine))


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy of the labelled tokens, in float32; only their logits are converted."""
    targets = labels[:, 1:]
    kept = targets != IGNORED
    return torch.nn.functional.cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction="sum")


def row_sums(logits: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each row's labelled tokens: (rows, SUMS) in float64, on the CPU. See `learned_logits` for the first two."""
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    right = logits.argmax(-1) == targets
    found = torch.stack([losses, torch.ones_like(losses), right.float()], dim=1).double().cpu()
    rows = torch.nonzero(labels[:, 1:] != IGNORED)[:, 0].cpu()
    return torch.zeros(len(labels), SUMS, dtype=torch.float64).index_add(0, rows, found)


def evaluate(model: Any, examples: Examples, groups: Groups, ranks: Ranks, batch_size: int) -> Floats:
    """(leaves, SUMS) over all ranks. Collective. Raises Diverged where a loss is not a number."""
    total = np.zeros((groups.leaves, SUMS))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for ids, counts in batches_of(examples, ranks.rank, ranks.world_size, batch_size):
            batch = collate(examples, [ids[i : i + 1] for i in range(len(ids))], packed=False)
            labels = batch.pop("labels").to(ranks.device)
            logits, targets = learned_logits(model, {"input_ids": batch["input_ids"].to(ranks.device)}, labels)
            if counts:
                np.add.at(total, groups.leaf[ids], row_sums(logits, targets, labels).numpy())
    model.train(was_training)
    summed = np.array(ranks.sum(total.flatten().tolist())).reshape(total.shape)
    if not np.isfinite(summed).all():
        raise FineTuneError(Reason.DIVERGED, "the loss on the validation data is not a number")
    return summed


def figures_of(sums: list[float]) -> dict[str, float]:
    """Mean cross-entropy per token in nats, its exponential, and the share of tokens that were the likeliest."""
    loss, tokens, right = sums
    mean = loss / max(1.0, tokens)
    return {"evalLoss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokenAccuracy": right / max(1.0, tokens)}
