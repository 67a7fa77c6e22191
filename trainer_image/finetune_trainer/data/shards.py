"""Shards: parquet files of some thousand examples; `finetune_api.run.Shard` says which columns they have."""

import array
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.formats import Kind
from finetune_api.run import Shard, Split
from finetune_trainer.data.tokenise import Tokens

MAX_ROWS = 50_000
MAX_TOKENS = 8 * 2**20
"""64 MiB of ids and labels before compression: what one writer holds in memory."""

Upload = Callable[[Path, str], tuple[int, str]]
"""File and key -> size and SHA-256."""


class Encoded(NamedTuple):
    """A record in tokens. All records of a job have the same members."""

    tokens: Tokens
    rejected: Tokens | None = None
    desirable: bool | None = None
    label: str | None = None
    reference: str | None = None
    slice: str | None = None

    @property
    def longest(self) -> int:
        return max(len(self.tokens.input_ids), len(self.rejected.input_ids) if self.rejected else 0)


class _Lists:
    """Sequences of tokens end to end, as the two columns of a shard."""

    def __init__(self) -> None:
        self.ids, self.labels = array.array("i"), array.array("i")
        self._ends, self._trained = array.array("i", [0]), array.array("i")

    def add(self, tokens: Tokens) -> None:
        self.ids.extend(tokens.input_ids)
        self.labels.extend(tokens.labels)
        self._ends.append(len(self.ids))
        self._trained.append(tokens.trained)

    def columns(self, prefix: str) -> dict[str, pa.Array]:
        ends = _int32(self._ends)
        return {
            f"{prefix}input_ids": pa.ListArray.from_arrays(ends, _int32(self.ids)),
            f"{prefix}labels": pa.ListArray.from_arrays(ends, _int32(self.labels)),
        }

    def outline(self, prefix: str) -> dict[str, pa.Array]:
        ends = np.frombuffer(self._ends, dtype=np.int32)
        return {f"{prefix}length": pa.array(np.diff(ends)), f"{prefix}trained": _int32(self._trained)}


class OutlineWriter:
    """What is known of each training row without its tokens: see `finetune_api.run.Outline`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: pq.ParquetWriter | None = None

    def add(self, columns: dict[str, pa.Array]) -> None:
        """The rows of one shard, in the order of the shards."""
        table = pa.table(columns)
        if self._file is None:
            self._file = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        self._file.write_table(table)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class ShardWriter:
    """Collects the examples of one data set in one split; every full shard is written, uploaded and forgotten."""

    def __init__(
        self,
        split: Split,
        dataset: str,
        kind: Kind,
        folder: Path,
        upload: Upload,
        next_number: Callable[[Split], int],
        outline: OutlineWriter | None = None,
        sliced: bool = False,
    ) -> None:
        """`sliced`: the examples say which slice they are of."""
        self._kind, self._outline, self._sliced = kind, outline, sliced
        self._split, self._dataset, self._folder, self._upload = split, dataset, folder, upload
        self._next_number = next_number
        self.shards: list[Shard] = []
        self._clear()

    def add(self, item: Encoded) -> None:
        self._chosen.add(item.tokens)
        self._trained += item.tokens.trained
        if item.rejected:
            self._rejected.add(item.rejected)
        self._known.append(item._replace(tokens=_NONE, rejected=None))
        if len(self._known) >= MAX_ROWS or len(self._chosen.ids) + len(self._rejected.ids) >= MAX_TOKENS:
            self.flush()

    def flush(self) -> None:
        rows = len(self._known)
        if not rows:
            return
        key = f"{self._split}/{self._next_number(self._split):05}.parquet"
        path = self._folder / key.replace("/", "-")
        columns = self._columns()
        pq.write_table(pa.table(columns), path, compression="zstd")
        if self._outline:
            known = {name: column for name, column in columns.items() if not pa.types.is_list(column.type)}
            lengths = self._chosen.outline("") | (self._rejected.outline("rejected_") if self._kind == "Pairs" else {})
            self._outline.add(lengths | known)
        size, sha256 = self._upload(path, key)
        path.unlink()
        self.shards.append(
            Shard(
                key=key,
                split=self._split,
                dataset=self._dataset,
                rows=rows,
                tokens=len(self._chosen.ids),
                rejected_tokens=len(self._rejected.ids),
                trained_tokens=self._trained,
                size=size,
                sha256=sha256,
            )
        )
        self._clear()

    def _columns(self) -> dict[str, pa.Array]:
        columns = self._chosen.columns("")
        if self._sliced:
            columns["slice"] = pa.array([item.slice for item in self._known], pa.string())
        match self._kind:
            case "Pairs":
                columns |= self._rejected.columns("rejected_")
            case "Unpaired":
                columns["desirable"] = pa.array([item.desirable for item in self._known], pa.bool_())
            case "Classes":
                columns["label"] = pa.array([item.label for item in self._known], pa.string())
            case "Prompts":
                columns["reference"] = pa.array([item.reference for item in self._known], pa.string())
        return columns

    def _clear(self) -> None:
        self._chosen, self._rejected = _Lists(), _Lists()
        self._known: list[Encoded] = []
        self._trained = 0


_NONE = Tokens([], [])


def _int32(values: "array.array[int]") -> pa.Array:
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
