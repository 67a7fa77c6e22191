"""Batches of prompts that the model is to answer, each once or several times."""

from collections.abc import Iterator
from typing import Any

import torch

from finetune_trainer.batches import Batch, Ints, MicroBatches, Plan
from finetune_trainer.shards import Prompts


class PromptBatches(MicroBatches):
    """Places in the global batch, where place p is answer p % answers to prompt p // answers."""

    def __init__(self, plan: Plan, prompts: Prompts, *, answers: int, **places: Any) -> None:
        super().__init__(plan, prompts.examples, packed=False, flat=False, **places)
        self.prompts, self.answers = prompts, answers
        self.size = plan.global_batch * answers

    def __len__(self) -> int:
        return self.plan.total_steps * (self.size // (self.world_size * self.micro_batch))

    def __iter__(self) -> Iterator[Batch]:
        together = self.world_size * self.micro_batch
        for step in self.steps():
            for start in range(self.rank * self.micro_batch, self.size, together):
                places = torch.arange(start, start + self.micro_batch)
                yield {"step": torch.tensor(step), "places": places, "num_items": torch.tensor(self.size)}

    def prompts_at(self, step: int, places: Ints) -> Ints:
        return self.plan.step(step)[places // self.answers]
