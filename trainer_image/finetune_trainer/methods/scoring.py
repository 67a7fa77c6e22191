"""Models with a head in place of a vocabulary: what the head says of the last token of each row."""

from typing import Any

import torch

from finetune_trainer.batches import Batch


class Scoring:
    """transformers reads the last token of a row that is not its padding token, so that token must pad the rows."""

    def __init__(self, config: Any) -> None:
        self._config = config.get_text_config()
        self._has_padding = self._config.pad_token_id is not None

    def __call__(self, model: Any, batch: Batch) -> torch.Tensor:
        """(rows, labels), in float32. `batch`: `input_ids` and `lengths`."""
        if not self._has_padding:
            self._config.pad_token_id = unused_at_end(batch)
        logits: torch.Tensor = model(input_ids=padded(batch, self._config.pad_token_id)).logits
        return logits.float()


def padded(batch: Batch, padding: int) -> torch.Tensor:
    """`input_ids` (rows, length) with this token wherever a row has ended."""
    ids = batch["input_ids"]
    ended = torch.arange(ids.shape[1], device=ids.device) >= batch["lengths"][:, None]
    return ids.masked_fill(ended, padding)


def unused_at_end(batch: Batch) -> int:
    """A token that is the last of no row: what may pad them where the model names none."""
    ends = set(batch["input_ids"].gather(1, batch["lengths"][:, None] - 1).flatten().tolist())
    return next(token for token in range(len(ends) + 1) if token not in ends)
