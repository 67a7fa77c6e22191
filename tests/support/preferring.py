"""Gangs that learn from pairs of answers, from answers with a verdict, or from texts with a class."""

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.formats import Kind, kind_of
from finetune_api.run import PreparedData, Shard
from finetune_trainer.workdir import WorkDir
from support.gang import VOCABULARY, Gang, make_gang
from support.s3 import S3

Row = dict[str, Any]
"""The columns of a shard."""
LISTS = pa.list_(pa.int32())


def make_pairs(count: int, seed: int = 0) -> list[Row]:
    """A chosen answer is of tokens from the lower half of the vocabulary, a rejected one of those from the upper."""
    rng, middle = np.random.default_rng(seed), VOCABULARY // 2
    rows = []
    for _ in range(count):
        prompt = rng.integers(3, VOCABULARY, size=3).tolist()
        good, bad = (rng.integers(low, low + 16, size=rng.integers(3, 12)).tolist() for low in (middle - 16, middle))
        row = {"input_ids": prompt + good, "rejected_input_ids": prompt + bad}
        rows.append(row | {name.replace("input_ids", "labels"): [-100] * 3 + ids[3:] for name, ids in row.items()})
    return rows


def judged(pairs: list[Row]) -> list[Row]:
    """Both answers of each pair by themselves."""
    return [
        {name: row[prefix + name] for name in ("input_ids", "labels")} | {"desirable": not prefix}
        for row in pairs
        for prefix in ("", "rejected_")
    ]


def make_labelled(count: int, seed: int = 0) -> list[Row]:
    """Texts of six tokens of their own for each of three classes, the last of which is rarer."""
    rng, names = np.random.default_rng(seed), ["low", "middle", "high"]
    rows = []
    for _ in range(count):
        label = int(rng.choice(3, p=[0.4, 0.4, 0.2]))
        ids = rng.integers(4 + 20 * label, 10 + 20 * label, size=rng.integers(3, 12)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * len(ids), "label": names[label]})
    return rows


@dataclass
class PreferenceGang(Gang):
    kind: Kind = "Pairs"
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """By split."""
    prepared: PreparedData | None = None
    """What `prepare` wrote, in place of `rows`; its shards are in `shards`."""
    shards: WorkDir | None = None

    def _index(self) -> PreparedData:
        if self.prepared and self.shards:
            for shard in self.prepared.shards:
                path = self.directory / "shards" / shard.key
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.shards.shard(shard.key).read_bytes())
            return self.prepared
        shards = [self._rows(split, rows) for split, rows in self.rows.items() if rows]
        longest = max(len(row["input_ids"]) for rows in self.rows.values() for row in rows)
        changes = {"kind": self.kind, "shards": shards, "max_tokens": longest, "classes": self.classes}
        return super()._index().model_copy(update=changes)

    @property
    def classes(self) -> list[str]:
        return sorted({row["label"] for row in self.rows["train"]}) if self.kind == "Classes" else []

    def _rows(self, split: str, rows: list[Row]) -> Shard:
        key = f"{split}/00000.parquet"
        path = self.directory / "shards" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        table = {
            name: pa.array(values, LISTS if isinstance(values[0], list) else None) for name, values in columns.items()
        }
        pq.write_table(pa.table(table), path)
        return Shard.model_validate(
            {
                "key": key,
                "split": split,
                "dataset": "pairs",
                "rows": len(rows),
                "tokens": sum(map(len, columns["input_ids"])),
                "rejectedTokens": sum(map(len, columns.get("rejected_input_ids", []))),
                "trainedTokens": 1,
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        )


def make_preference_gang(directory: Path, s3: S3, model: Path, method: Row, **arguments: Any) -> PreferenceGang:
    gang = make_gang(directory, s3, model, method=method, **arguments)
    kind = kind_of(method["type"], gang.config.spec.datasets)
    known = {f.name: getattr(gang, f.name) for f in dataclasses.fields(gang)} | {"train": {}, "validation": []}
    train, validation = make_pairs(48), make_pairs(9, seed=99)
    if kind == "Classes":
        train, validation = make_labelled(64), make_labelled(30, seed=99)
    if kind == "Unpaired":
        train, validation = judged(train), judged(validation)
    return PreferenceGang(**known, kind=kind, rows={"train": train, "validation": validation})
