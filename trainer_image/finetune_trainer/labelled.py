"""Batches of labelled texts: what is read to its end, and the number of its class."""

from collections.abc import Iterator
from typing import Any

import torch

from finetune_trainer.batches import Batch, Ints, MicroBatches, Plan, collate
from finetune_trainer.shards import Classes


def collate_classes(data: Classes, ids: Ints) -> Batch:
    """`input_ids` (rows, length), `lengths` and `classes` (rows,): the places of the classes in their names."""
    batch = collate(data.examples, [ids[i : i + 1] for i in range(len(ids))], packed=False)
    return {
        "input_ids": batch["input_ids"],
        "lengths": torch.from_numpy(data.examples.lengths[ids]),
        "classes": torch.from_numpy(data.label[ids]),
    }


class ClassBatches(MicroBatches):
    """Denominator: rows."""

    def __init__(self, plan: Plan, data: Classes, **places: Any) -> None:
        super().__init__(plan, data.examples, packed=False, flat=False, **places)
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        for step in self.steps():
            items = torch.tensor([len(self.plan.step(step))])
            for ids in self.plan.micro_steps(step, self.rank, self.world_size, self.micro_batch):
                yield collate_classes(self.data, ids) | {"num_items": items}
