"""Shards: parquet files of some thousand examples, columns `input_ids` and `labels` (list<int32>)."""

import array
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.run import Shard, Split
from finetune_trainer.data.tokenise import Tokens

MAX_ROWS = 50_000
MAX_TOKENS = 8 * 2**20
"""64 MiB of ids and labels before compression: what one writer holds in memory."""

Upload = Callable[[Path, str], tuple[int, str]]
"""File and key -> size and SHA-256."""


class ShardWriter:
    """Collects the examples of one data set in one split; every full shard is written, uploaded and forgotten."""

    def __init__(
        self, split: Split, dataset: str, folder: Path, upload: Upload, next_number: Callable[[Split], int]
    ) -> None:
        self._split, self._dataset, self._folder, self._upload = split, dataset, folder, upload
        self._next_number = next_number
        self.shards: list[Shard] = []
        self._clear()

    def add(self, tokens: Tokens) -> None:
        self._ids.extend(tokens.input_ids)
        self._labels.extend(tokens.labels)
        self._ends.append(len(self._ids))
        self._trained += tokens.trained
        if len(self._ends) > MAX_ROWS or len(self._ids) >= MAX_TOKENS:
            self.flush()

    def flush(self) -> None:
        rows = len(self._ends) - 1
        if not rows:
            return
        key = f"{self._split}/{self._next_number(self._split):05}.parquet"
        path = self._folder / key.replace("/", "-")
        columns = [pa.ListArray.from_arrays(_int32(self._ends), _int32(values)) for values in (self._ids, self._labels)]
        pq.write_table(pa.Table.from_arrays(columns, ["input_ids", "labels"]), path, compression="zstd")
        size, sha256 = self._upload(path, key)
        path.unlink()
        self.shards.append(
            Shard(
                key=key,
                split=self._split,
                dataset=self._dataset,
                rows=rows,
                tokens=len(self._ids),
                trained_tokens=self._trained,
                size=size,
                sha256=sha256,
            )
        )
        self._clear()

    def _clear(self) -> None:
        self._ids, self._labels = array.array("i"), array.array("i")
        self._ends = array.array("i", [0])
        self._trained = 0


def _int32(values: "array.array[int]") -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
