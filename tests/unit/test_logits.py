"""Logits only where something is learned: the same loss and gradients as with all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from finetune_api.tuning import LoRA, Tuning, VirtualTokens
from finetune_trainer import tuning
from finetune_trainer.batches import IGNORED
from finetune_trainer.logits import learned_logits
from finetune_trainer.methods.losses import row_log_probs, sequence_log_probs
from support.gang import VOCABULARY, make_tiny_model

LABELS = torch.tensor([[IGNORED, 5, 6, IGNORED, 7, 8], [IGNORED] * 6, [IGNORED, IGNORED, IGNORED, 9, 3, IGNORED]])
IDS = torch.randint(3, VOCABULARY, LABELS.shape, generator=torch.Generator().manual_seed(1))


def whole(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = labels[:, 1:] != IGNORED
    return model(input_ids=ids).logits[:, -labels.shape[1] : -1][kept], labels[:, 1:][kept]


def gradients(model: Any, logits: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize(
    "chosen",
    [
        Tuning(type="LoRA", lora=LoRA(rank=2)),
        Tuning(type="PromptTuning", prompt_tuning=VirtualTokens(tokens=5)),
        Tuning(type="PrefixTuning", prefix_tuning=VirtualTokens(tokens=5)),
        Tuning(type="Full"),
    ],
    ids=lambda tuning: tuning.type,
)
def test_loss_and_gradients_are_those_of_all_logits(chosen: Tuning, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    model = tuning.tune(base, chosen, "s3://b/m", seed=1, gradient_checkpointing=False, masters=True)
    logits, targets = learned_logits(model, {"input_ids": IDS}, LABELS)
    expected, same = whole(model, IDS, LABELS)
    assert logits.shape == (6, VOCABULARY)
    assert torch.equal(targets, same)
    torch.testing.assert_close(logits, expected)
    for found, wanted in zip(gradients(model, logits, targets), gradients(model, expected, same), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_prompt_that_is_switched_off_stands_before_no_row(tmp_path: Path) -> None:
    """As where DPO asks the model that it was."""
    base = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    chosen = Tuning(type="PromptTuning", prompt_tuning=VirtualTokens(tokens=5))
    expected = whole(base, IDS, LABELS)[0]
    model = tuning.tune(base, chosen, "s3://b/m", seed=1, gradient_checkpointing=False, masters=True)
    with model.disable_adapter():
        torch.testing.assert_close(learned_logits(model, {"input_ids": IDS}, LABELS)[0], expected)


def test_the_head_computes_nothing_where_nothing_is_learned(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    seen: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    learned_logits(model, {"input_ids": IDS}, LABELS)
    assert [shape.numel() // VOCABULARY for shape in seen] == [6]


def test_a_batch_without_labels_still_has_gradients(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "model"))
    logits, targets = learned_logits(model, {"input_ids": IDS}, torch.full_like(LABELS, IGNORED))
    assert all(not gradient.any() for gradient in gradients(model, logits, targets))


class Old(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: torch.Tensor) -> Any:
        return super().forward(input_ids=input_ids)


def test_a_family_that_cannot_be_told_computes_all(tmp_path: Path) -> None:
    model = Old.from_pretrained(make_tiny_model(tmp_path / "model"))
    logits, targets = learned_logits(model, {"input_ids": IDS}, LABELS)
    torch.testing.assert_close(logits, whole(model, IDS, LABELS)[0])
    assert len(targets) == 6


def test_log_probabilities_of_rows_are_the_same_from_either() -> None:
    logits = torch.randn(*LABELS.shape, VOCABULARY)
    kept = LABELS[:, 1:] != IGNORED
    for found, wanted in zip(
        row_log_probs(logits[:, :-1][kept], LABELS[:, 1:][kept], LABELS),
        sequence_log_probs(logits, LABELS),
        strict=True,
    ):
        assert torch.equal(found, wanted)
