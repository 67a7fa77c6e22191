"""What every method shares: the Hugging Face Trainer over our own batches.

The Trainer brings gradient accumulation, clipping, mixed precision, DDP and DeepSpeed. Order, batches and the loss's
denominators are ours: they are those of the whole global batch, so that neither the number of ranks nor the micro-batch
changes what is learned.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from finetune_trainer.batches import Batch, MicroBatches
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Groups
from finetune_trainer.methods.reference import Reference


class MethodTrainer(Trainer):  # type: ignore[misc]
    """A method says what the loss of a micro-batch is (`compute_loss`) and what is measured on held-out data."""

    private = ""
    """Trained parameters whose names begin so serve the training alone: they are not published."""

    def __init__(self, model: Any, args: TrainingArguments, batches: MicroBatches) -> None:
        super().__init__(model=model, args=args)
        # It would print every line a second time, on every rank.
        self.remove_callback(PrinterCallback)
        self.batches = batches
        self.loss_is_scaled_for_ga = True
        self.save_state: Callable[[], None] = lambda: None
        """What a callback's `control.should_save` brings about. Collective."""
        self.evaluate_state: Callable[[], None] = lambda: None
        """The same of `control.should_evaluate`, which comes before it."""
        self.reference: Reference | None = None
        """The model as it was before, for a method that compares with it."""

    def measure(self, data: Any, ranks: Ranks, batch_size: int, groups: Groups) -> dict[str, float]:
        """Figures on held-out data of the kind that the method learns from, by name: of all of it and of each group.

        Collective; raises Diverged.
        """
        raise NotImplementedError

    def published(self, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those of the trained parameters that are part of the result."""
        hidden = self.private
        return {name: value for name, value in parameters.items() if not (hidden and name.startswith(hidden))}

    @property
    def confusion(self) -> Sequence[Sequence[int]]:
        """Of what was measured last, examples by class (outer) and by the class that the model took them for."""
        return ()

    def begin(self) -> None:
        """Once the model is wrapped, before anything is restored; for `on_train_begin`. Collective."""
        if self.reference:
            self.reference.begin(self)

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model as it was before, without dropout and without gradients. Collective under ZeRO-3."""
        assert self.reference
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.reference.active():
            yield self.model_wrapped
        self.model.train(was_training)

    def start_at(self, step: int) -> None:
        """Continue after `step` optimizer steps; for `on_train_begin`."""
        self.state.global_step = self._globalstep_last_logged = step
        self.batches.first_step = step

    def get_train_dataloader(self) -> MicroBatches:  # sharded already: accelerate must not shard it again
        return self.batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """The micro-batches of one step, and the denominators of the whole global batch: known without asking."""
        batches = list(islice(epoch_iterator, num_batches))
        items = [batch.pop("num_items") for batch in batches]
        return batches, items[0] if items else None

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.control.should_evaluate = False
        self.evaluate_state()
        return {}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.save_state()
