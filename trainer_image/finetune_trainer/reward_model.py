"""A reward model that judges: frozen, whole on every rank, and not a part of what is trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers.integrations import deepspeed

from finetune_trainer.methods.scoring import Scoring
from finetune_trainer.model import load_model
from finetune_trainer.start import Start


class RewardModel:
    def __init__(self, start: Start, dtype: torch.dtype, attention: str, device: torch.device) -> None:
        """Raises ModelInvalid."""
        with without_partitioning():
            model = load_model(start.model, dtype, attention, device, task="SEQ_CLS")
            if start.adapter:
                model = PeftModel.from_pretrained(model, start.adapter, local_files_only=True)
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self._scoring = Scoring(model.config)

    def score(self, rows: Sequence[Sequence[int] | np.ndarray[Any, Any]]) -> torch.Tensor:
        """(rows,) in float64: what each row of tokens is worth. Not collective."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        device = next(self.model.parameters()).device
        with torch.no_grad():
            found = self._scoring(self.model, {"input_ids": ids.to(device), "lengths": lengths.to(device)})
        return found[:, 0].double()


@contextmanager
def without_partitioning() -> Iterator[None]:
    """Under ZeRO-3 transformers would partition every model that it loads, also one that no engine gathers again."""
    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known
