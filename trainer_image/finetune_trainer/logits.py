"""Logits where something is learned and nowhere else: of a large vocabulary the others are most of a step's memory."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from finetune_trainer.batches import IGNORED, Batch


def learned_logits(model: Any, inputs: Batch, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 logits (n, vocabulary) before each labelled token, row after row, and those tokens (n,).

    `inputs`: what the model is called with; `labels`: (rows, length), IGNORED where nothing is learned, as is the first
    of each row. One forward pass on every rank, whatever is labelled there (ZeRO-3: a collective).
    """
    kept = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][kept]
    if not _takes_positions(type(_causal(model)).forward):
        return model(**inputs).logits[:, -labels.shape[1] : -1][kept].float(), targets
    # The last position predicts nothing, and virtual tokens stand in front of the row's own.
    mask = torch.nn.functional.pad(kept, (_virtual_tokens(model), 1))
    return model(**inputs, logits_to_keep=mask).logits.float(), targets


def _causal(model: Any) -> Any:
    """The transformers model below DDP's or DeepSpeed's wrapper and peft's."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


@functools.cache
def _takes_positions(forward: Callable[..., Any]) -> bool:
    """Whether this family can be told which positions are wanted; some old ones cannot."""
    return "logits_to_keep" in inspect.signature(forward).parameters


def _virtual_tokens(model: Any) -> int:
    """Of a prompt that is put before each row; a prefix sits in the layers' keys instead."""
    model = getattr(model, "module", model)
    config = getattr(model, "peft_config", {}).get("default")
    if config and config.peft_type == "PROMPT_TUNING" and model.has_active_enabled_adapter:
        return int(config.num_virtual_tokens)
    return 0
