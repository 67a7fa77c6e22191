"""Batches of preferences: pairs as one forward pass, and judged answers with the answers that KTO compares them to."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from finetune_trainer.batches import IGNORED, Batch, Examples, Ints, MicroBatches, Plan, Rows, collate
from finetune_trainer.shards import Pairs, Unpaired


def rows_of_pairs(pairs: Pairs) -> Rows:
    """One row per pair, as long as both of its sequences."""
    whole = np.arange(len(pairs.chosen) + 1, dtype=np.int64)
    trained = pairs.chosen.trained() + pairs.rejected.trained()
    lengths = pairs.chosen.lengths + pairs.rejected.lengths
    return Rows(whole[:-1], whole, lengths, trained, pairs.chosen.dataset, pairs.chosen.chunk)


def collate_pairs(pairs: Pairs, ids: Ints) -> Batch:
    """`input_ids`, `labels` (2 * pairs, length) and `lengths` (2 * pairs,): the chosen sequences, then the rejected."""
    parts = [collate(side, [ids[i : i + 1] for i in range(len(ids))], packed=False) for side in _sides(pairs)]
    batch = {name: _stacked([part[name] for part in parts], fill) for name, fill in _FILL.items()}
    return batch | {"lengths": torch.from_numpy(np.concatenate([side.lengths[ids] for side in _sides(pairs)]))}


def collate_unpaired(data: Unpaired, ids: Ints, others: Ints, max_length: int) -> Batch:
    """Judged answers, `desirable` (rows,), and `kl_input_ids`, `kl_labels`: each prompt with the answer of another row.

    `others`: (rows,) the row whose answer it gets; cut at `max_length` tokens.
    """
    batch = collate(data.examples, [ids[i : i + 1] for i in range(len(ids))], packed=False)
    swapped = swap_answers(data.examples, ids, others, max_length)
    mixed = collate(swapped, [np.array([i]) for i in range(len(ids))], packed=False)
    return batch | {
        "desirable": torch.from_numpy(data.desirable[ids]),
        "kl_input_ids": mixed["input_ids"],
        "kl_labels": mixed["labels"],
    }


def swap_answers(examples: Examples, ids: Ints, others: Ints, max_length: int) -> Examples:
    """Row k: the prompt of ids[k], then the answer of others[k]."""
    tokens, labels = [], []
    for i, j in zip(ids, others, strict=True):
        (asked, asked_labels), (_, other_labels) = _row(examples, int(i)), _row(examples, int(j))
        prompt, answer = _answer_at(asked_labels), _answer_at(other_labels)
        answer_ids = _row(examples, int(j))[0][answer:]
        tokens.append(np.concatenate([asked[:prompt], answer_ids])[:max_length])
        labels.append(np.concatenate([np.full(prompt, IGNORED), other_labels[answer:]])[:max_length])
    ends = np.cumsum([0, *map(len, tokens)])
    return Examples(
        np.concatenate(tokens).astype(np.int32),
        np.concatenate(labels).astype(np.int32),
        ends,
        np.zeros(len(ids), dtype=np.int64),
    )


class PairBatches(MicroBatches):
    """Denominators: pairs, and tokens of the chosen sequences that something predicts."""

    def __init__(self, plan: Plan, pairs: Pairs, **places: Any) -> None:
        super().__init__(plan, pairs.chosen, packed=False, flat=False, **places)
        self.pairs = pairs

    def __iter__(self) -> Iterator[Batch]:
        for step in self.steps():
            ids = self.plan.step(step)
            items = torch.tensor([len(ids), int((self.pairs.chosen.lengths[ids] - 1).sum())])
            for part in self.plan.micro_steps(step, self.rank, self.world_size, self.micro_batch):
                yield collate_pairs(self.pairs, part) | {"num_items": items}


class UnpairedBatches(MicroBatches):
    """Denominator: rows. A prompt gets the answer of the row before it in the global batch, which is about as long."""

    def __init__(self, plan: Plan, data: Unpaired, *, max_length: int, **places: Any) -> None:
        super().__init__(plan, data.examples, packed=False, flat=False, **places)
        self.data, self.max_length = data, max_length

    def __iter__(self) -> Iterator[Batch]:
        for step in self.steps():
            ids = self.plan.step(step)
            other, items = others_of(ids), torch.tensor([len(ids)])
            for part in self.plan.micro_steps(step, self.rank, self.world_size, self.micro_batch):
                others = np.array([other[int(i)] for i in part])
                yield collate_unpaired(self.data, part, others, self.max_length) | {"num_items": items}


def others_of(ids: Ints) -> Mapping[int, int]:
    """Each row's neighbour: whose answer its prompt gets."""
    return dict(zip(ids.tolist(), np.roll(ids, 1).tolist(), strict=True))


_FILL = {"input_ids": 0, "labels": IGNORED}


def _sides(pairs: Pairs) -> tuple[Examples, Examples]:
    return pairs.chosen, pairs.rejected


def _stacked(parts: list[torch.Tensor], fill: int) -> torch.Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def _row(examples: Examples, i: int) -> tuple[Any, Any]:
    span = slice(int(examples.offsets[i]), int(examples.offsets[i + 1]))
    return examples.input_ids[span], examples.labels[span]


def _answer_at(labels: Any) -> int:
    """Where the answer begins: the first label that is learned."""
    learned = np.flatnonzero(labels != IGNORED)
    return int(learned[0]) if len(learned) else len(labels)
