"""Classification: a new head over the last token of a text; the loss is the mean over the rows of the global batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainingArguments

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.batches import Batch, Ints, MicroBatches
from finetune_trainer.distributed import Ranks
from finetune_trainer.evaluation.groups import Groups
from finetune_trainer.evaluation.loss import batches_of
from finetune_trainer.labelled import collate_classes
from finetune_trainer.methods.base import MethodTrainer
from finetune_trainer.methods.scoring import Scoring
from finetune_trainer.shards import Classes


class ClassifyTrainer(MethodTrainer):
    def __init__(self, model: Any, args: TrainingArguments, batches: MicroBatches) -> None:
        super().__init__(model, args, batches)
        self._scoring = Scoring(model.config)
        self._confusion: list[list[int]] = []

    @property
    def confusion(self) -> list[list[int]]:
        return self._confusion

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        assert num_items_in_batch is not None
        losses = class_losses(self._scoring(model, inputs), inputs["classes"])
        # DDP and ZeRO average gradients over the ranks; the denominator is the whole batch's already.
        return losses.sum() * (self.batches.world_size / int(num_items_in_batch))

    def measure(self, data: Classes, ranks: Ranks, batch_size: int, groups: Groups) -> dict[str, float]:
        losses, predicted = self._verdicts(data, ranks, batch_size)
        if not np.isfinite(losses).all():
            raise FineTuneError(Reason.DIVERGED, "the loss on the validation data is not a number")
        self._confusion = confusion(data.label, predicted, len(data.names))
        found: dict[str, float] = {}
        for suffix, ids in groups.members():
            figures = {"evalLoss": float(losses[ids].mean())} | figures_of(data.label[ids], predicted[ids])
            found |= {f"{name}{suffix}": value for name, value in figures.items()}
        return found

    def _verdicts(self, data: Classes, ranks: Ranks, batch_size: int) -> tuple[NDArray[np.float64], Ints]:
        """Of every example its loss and the class that the model takes it for, on all ranks alike; both (examples,)."""
        model, was_training = self.model_wrapped, self.model.training
        model.eval()
        found = np.zeros((2, len(data.label)))
        with torch.no_grad():
            for ids, counts in batches_of(data.examples, ranks.rank, ranks.world_size, batch_size):
                batch = {name: part.to(ranks.device) for name, part in collate_classes(data, ids).items()}
                logits = self._scoring(model, batch)
                if counts:
                    losses = class_losses(logits, batch["classes"])
                    found[:, ids] = torch.stack([losses, logits.argmax(-1).float()]).cpu().numpy()
        model.train(was_training)
        # Each example was seen by one rank; the others add nothing to it.
        whole = np.array(ranks.sum(found.reshape(-1).tolist())).reshape(found.shape)
        return whole[0], whole[1].astype(np.int64)


def class_losses(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row, (rows,). `logits`: (rows, classes)."""
    return torch.nn.functional.cross_entropy(logits.float(), classes, reduction="none")


def figures_of(label: Ints, predicted: Ints) -> dict[str, float]:
    """scikit-learn's figures, both arguments (examples,): each class that occurs in either counts the same (macro)."""
    # Here, since it takes a second to import and is of no use to other methods.
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(label, predicted, average="macro", zero_division=0)
    return {
        "accuracy": float(accuracy_score(label, predicted)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }


def confusion(label: Ints, predicted: Ints, classes: int) -> list[list[int]]:
    """Examples by class (outer) and by the class that the model takes them for."""
    counts = np.bincount(label * classes + predicted, minlength=classes * classes)
    return [[int(count) for count in row] for row in counts.reshape(classes, classes)]


def per_class(matrix: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """Precision, recall, F1 and support of each class, from its confusion matrix."""
    table = np.array(matrix, dtype=np.float64)
    right, support, said = table.diagonal(), table.sum(1), table.sum(0)
    return [
        {
            "precision": _share(hit, spoken),
            "recall": _share(hit, there),
            "f1": _share(2 * hit, spoken + there),
            "support": there,
        }
        for hit, there, spoken in zip(right.tolist(), support.tolist(), said.tolist(), strict=True)
    ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
