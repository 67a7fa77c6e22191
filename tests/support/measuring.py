"""Gangs with several held-out splits, datasets and slices, and what plain transformers measures of the same rows."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.run import PreparedData, Shard
from support.gang import VOCABULARY, Example, Gang, make_gang
from support.s3 import S3

Part = dict[str, list[Example]]
"""By slice; "" is none."""
STRIDES = {"one": 1, "two": 2, "three": 3}


def strides(count: int, stride: int, seed: int, length: int = 9) -> list[Example]:
    """Sequences of one stride: after three tokens of prompt the rest can be told, and the last one ends it."""
    rng = np.random.default_rng(seed)
    rows = []
    for start in rng.integers(3, VOCABULARY, size=count).tolist():
        ids = [1, *(int(3 + (start + stride * i) % (VOCABULARY - 3)) for i in range(length)), 2]
        rows.append((ids, [-100] * 4 + ids[4:]))
    return rows


@dataclass
class MeasuredGang(Gang):
    held: dict[str, dict[str, Part]] = field(default_factory=dict)
    """Split, dataset, slice."""

    def rows(self, split: str, dataset: str | None = None, slice_: str | None = None) -> list[Example]:
        return [
            row
            for name, part in self.held[split].items()
            for value, rows in part.items()
            for row in rows
            if dataset in (None, name) and slice_ in (None, value)
        ]

    def _index(self) -> PreparedData:
        index = super()._index()
        shards = [self._held_shard(split, n, *part) for split in self.held for n, part in enumerate(self._parts(split))]
        longest = max(shard.tokens // max(1, shard.rows) for shard in [*index.shards, *shards])
        return index.model_copy(update={"shards": [*index.shards, *shards], "max_tokens": longest + 1})

    def _parts(self, split: str) -> Iterator[tuple[str, list[tuple[Example, str]]]]:
        for name, part in self.held[split].items():
            yield name, [(row, value) for value, rows in part.items() for row in rows]

    def _held_shard(self, split: str, number: int, dataset: str, rows: list[tuple[Example, str]]) -> Shard:
        shard = self._shard(split, dataset, number, [row for row, _ in rows])
        path = self.directory / "shards" / shard.key
        slices = pa.array([value or None for _, value in rows], pa.string())
        pq.write_table(pq.read_table(path).append_column("slice", slices), path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return shard.model_copy(update={"size": path.stat().st_size, "sha256": digest})


def make_measured_gang(
    directory: Path, s3: S3, model: Path, held: dict[str, dict[str, Part]], train: Part, **arguments: Any
) -> MeasuredGang:
    """`train`: by dataset."""
    datasets = [{"name": name, "uri": f"s3://bucket/data/{name}.jsonl"} for name in train]
    gang = make_gang(directory, s3, model, validation=0, datasets=datasets, **arguments)
    known = {f.name: getattr(gang, f.name) for f in dataclasses.fields(gang)} | {"train": train}
    return MeasuredGang(**known, held=held)


def make_judge(directory: Path) -> Any:
    """A reward model with random weights, as files and as plain transformers loads it."""
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(directory)
    return AutoModelForSequenceClassification.from_pretrained(directory).eval()


def measured(model: Any, rows: Iterable[Example]) -> dict[str, float]:
    """Loss, perplexity and token accuracy, one row at a time."""
    import torch

    loss = count = right = 0.0
    with torch.no_grad():
        for ids, labels in rows:
            logits, targets = model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
            loss += float(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
            count += int((targets != -100).sum())
            right += int((logits.argmax(-1) == targets).sum())
    mean = loss / count
    return {"evalLoss": mean, "perplexity": math.exp(mean), "tokenAccuracy": right / count}


def answers(model: Any, rows: Iterable[Example], max_new_tokens: int, ended: bool = False) -> list[list[int]]:
    """The likeliest token each time, one row at a time, without a cache; `ended`: with the token that ended it."""
    import torch

    found = []
    with torch.no_grad():
        for ids, labels in rows:
            text = ids[: next(i for i, label in enumerate(labels) if label != -100)]
            start = len(text)
            for _ in range(max_new_tokens):
                token = int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax())
                text = [*text, token] if token != 2 or ended else text
                if token == 2:
                    break
            found.append(text[start:])
    return found
