"""Classification: its loss against transformers' own, its figures against scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import classification_report, confusion_matrix

from finetune_trainer.batches import Examples
from finetune_trainer.labelled import collate_classes
from finetune_trainer.methods.classify import class_losses, confusion, figures_of, per_class
from finetune_trainer.methods.scoring import Scoring
from finetune_trainer.model import load_model
from finetune_trainer.shards import Classes
from support.gang import make_tiny_model
from support.preferring import make_labelled

NAMES = ["high", "low", "middle"]


def labelled(count: int = 7) -> Classes:
    rows = make_labelled(count, seed=3)
    ids = np.concatenate([row["input_ids"] for row in rows]).astype(np.int32)
    examples = Examples(
        ids,
        np.full(len(ids), -100, dtype=np.int32),
        np.cumsum([0, *(len(row["input_ids"]) for row in rows)]),
        np.zeros(count, dtype=np.int64),
    )
    return Classes(examples, np.array([NAMES.index(row["label"]) for row in rows]), NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def load(folder: Path) -> Any:
    torch.manual_seed(1)
    return load_model(folder, torch.float32, "sdpa", None, task="SEQ_CLS", classes=NAMES).eval()


def test_the_loss_is_that_of_transformers_on_the_same_batch(folder: Path) -> None:
    model, data = load(folder), labelled()
    batch = collate_classes(data, np.arange(7))
    ours = class_losses(Scoring(model.config)(model, batch), batch["classes"])
    # As its documentation shows it: padded with its padding token, with an attention mask.
    mask = torch.arange(batch["input_ids"].shape[1]) < batch["lengths"][:, None]
    theirs = model(
        input_ids=batch["input_ids"].masked_fill(~mask, model.config.pad_token_id),
        attention_mask=mask.long(),
        labels=batch["classes"],
    )
    assert float(ours.mean()) == pytest.approx(float(theirs.loss), abs=1e-6)


def test_padding_changes_no_row_whether_the_model_names_a_padding_token_or_none(folder: Path) -> None:
    model, data = load(folder), labelled()
    alone = [model(input_ids=collate_classes(data, np.array([i]))["input_ids"][:, :n]).logits[0]
             for i, n in enumerate(data.examples.lengths)]  # fmt: skip
    for padding in (0, None):
        model.config.pad_token_id = padding
        together = Scoring(model.config)(model, collate_classes(data, np.arange(7)))
        assert torch.allclose(together, torch.stack(alone), atol=1e-5)


def test_the_head_is_named_in_the_config(folder: Path) -> None:
    model = load(folder)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: place for place, name in enumerate(NAMES)}
    assert model.config.num_labels == model.score.out_features == 3


def test_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 3, 200), rng.choice(3, 200, p=[0.7, 0.3, 0.0])
    known: dict[str, Any] = classification_report(label, predicted, output_dict=True, zero_division=0)
    found = figures_of(label, predicted)
    assert found.pop("accuracy") == pytest.approx(known["accuracy"])
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score"}
    assert found == pytest.approx({ours: known["macro avg"][theirs] for ours, theirs in names.items()})
    matrix = confusion(label, predicted, 3)
    assert matrix == confusion_matrix(label, predicted).tolist()
    for place, row in enumerate(per_class(matrix)):
        theirs = {ours: known[str(place)][name] for ours, name in (names | {"support": "support"}).items()}
        assert row == pytest.approx(theirs)


def test_a_class_that_is_never_met_is_nothing_to_divide_by() -> None:
    matrix = confusion(np.array([0, 0]), np.array([0, 0]), 2)
    assert matrix == [[2, 0], [0, 0]]
    assert per_class(matrix)[1] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0.0}
