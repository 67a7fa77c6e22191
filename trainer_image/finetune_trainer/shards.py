"""The shards of a split as arrays on disk, decoded once per pod and shared by its ranks through the page cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune_api.failures import FineTuneError, Reason
from finetune_api.formats import Kind
from finetune_api.run import PreparedData, Shard, Split
from finetune_trainer.batches import Examples, Ints
from finetune_trainer.workdir import WorkDir

COLUMNS = ("input_ids", "labels")
REJECTED = "rejected_"


@dataclass(frozen=True)
class Pairs:
    """Example i of both answers the same prompt: the labels of either are IGNORED up to where its answer begins."""

    chosen: Examples
    rejected: Examples


@dataclass(frozen=True)
class Unpaired:
    examples: Examples
    desirable: NDArray[np.bool_]
    """(examples,)"""


@dataclass(frozen=True)
class Classes:
    examples: Examples
    """No label is learned."""
    label: NDArray[np.int64]
    """(examples,): places in `names`."""
    names: list[str]


@dataclass(frozen=True)
class Prompts:
    examples: Examples
    """What the model is asked, up to where it answers; no label is learned."""
    references: list[str | None]
    """(examples,)"""


def kind_of(index: PreparedData, split: Split) -> Kind:
    """What could be done before is always measured by the loss of answers, whatever is learned."""
    return "Tokens" if split == "retention" else index.kind


def datasets_of(index: PreparedData, names: list[str], split: Split) -> list[str]:
    """What `Examples.dataset` counts: the datasets of the spec, then those of held-out data alone."""
    return list(dict.fromkeys([*names, *(shard.dataset for shard in index.shards if shard.split == split)]))


def decode(index: PreparedData, names: list[str], split: Split, work: WorkDir) -> None:
    """Writes `data/<split>.<part>.npy`; by one process of a pod.

    `names`: the datasets, in the order of the spec; those of held-out data alone come after them.
    """
    shards = [shard for shard in index.shards if shard.split == split]
    known = datasets_of(index, names, split)
    _decode(shards, [shard.tokens for shard in shards], known, split, "", work)
    if split != "train":
        slices = pa.array(_column(shards, "slice", work, optional=True), pa.string())
        pq.write_table(pa.table({"slice": slices}), work.data / f"{split}.slice.parquet")
    if kind_of(index, split) == "Pairs":
        _decode(shards, [shard.rejected_tokens for shard in shards], known, split, REJECTED, work)
    save_columns(index, split, work, lambda name: _column(shards, name, work))


def save_columns(index: PreparedData, split: Split, work: WorkDir, column: Callable[[str], list[Any]]) -> None:
    """What is known of each example beside its tokens; `column` gives the values of the shards' column of a name."""
    match kind_of(index, split):
        case "Unpaired":
            found = [np.asarray(value, dtype=np.bool_) for value in column("desirable")]
            np.save(_path(work, split, "desirable"), np.array(found, dtype=np.bool_))
        case "Classes":
            number = {name: place for place, name in enumerate(index.classes)}
            labels = [number[str(value)] for value in column("label")]
            np.save(_path(work, split, "label"), np.array(labels, dtype=np.int64))
        case "Prompts":
            table = pa.table({"reference": pa.array(column("reference"), pa.string())})
            pq.write_table(table, work.data / f"{split}.reference.parquet")


def _decode(shards: list[Shard], sizes: list[int], known: list[str], split: Split, prefix: str, work: WorkDir) -> None:
    """The sequences whose columns begin with `prefix`; `sizes`: their tokens in each shard."""
    make_arrays(work, split, prefix, sum(sizes))
    offsets: list[Ints] = [np.zeros(1, dtype=np.int64)]
    learned: list[Ints] = [np.zeros(0, dtype=np.int64)]
    token = 0
    for shard, size in zip(shards, sizes, strict=True):
        read = write_tokens(work, split, shard, prefix, token, size)
        offsets.append(token + read.offsets[1:])
        learned.append(read.trained())
        token += size
    dataset = np.repeat([known.index(shard.dataset) for shard in shards], [shard.rows for shard in shards])
    save_rows(work, split, prefix, np.concatenate(offsets), dataset, np.concatenate(learned))


def token_paths(work: WorkDir, split: Split, prefix: str) -> list[Path]:
    return [_path(work, split, prefix + name) for name in COLUMNS]


def make_arrays(work: WorkDir, split: Split, prefix: str, tokens: int) -> list[Path]:
    """Files of zeros, which take no room yet."""
    paths = token_paths(work, split, prefix)
    for path in paths:
        # A memory-mapped array cannot be empty: one token more than there is.
        np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(tokens + 1,))
    return paths


def write_tokens(work: WorkDir, split: Split, shard: Shard, prefix: str, start: int, size: int) -> Examples:
    """Writes the sequences of a shard, `size` tokens, from token `start` on; what is returned begins at 0."""
    columns, ends = _read(work.shard(shard.key), shard, prefix, size)
    for path, values in zip(token_paths(work, split, prefix), columns, strict=True):
        array = np.load(path, mmap_mode="r+")
        array[start : start + size] = values
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    return Examples(columns[0], columns[1], offsets, np.zeros(shard.rows, dtype=np.int64))


def byte_of(path: Path, token: int) -> int:
    """Where a token stands in one of `token_paths`."""
    array: Any = np.load(path, mmap_mode="r")
    return int(array.offset) + token * int(array.itemsize)


def save_rows(
    work: WorkDir, split: Split, prefix: str, offsets: Ints, dataset: Ints, learned: Ints, chunk: Ints | None = None
) -> None:
    """What `Examples` says of each example."""
    for name, values in (("offsets", offsets), ("dataset", dataset), ("learned", learned), ("chunk", chunk)):
        if values is not None:
            np.save(_path(work, split, prefix + name), values.astype(np.int64))


def load(split: Split, work: WorkDir, prefix: str = "") -> Examples:
    """What `decode` wrote; the tokens stay on disk until they are read."""
    return Examples(
        input_ids=np.load(_path(work, split, f"{prefix}input_ids"), mmap_mode="r"),
        labels=np.load(_path(work, split, f"{prefix}labels"), mmap_mode="r"),
        offsets=np.load(_path(work, split, f"{prefix}offsets")),
        dataset=np.load(_path(work, split, f"{prefix}dataset")),
        learned=np.load(_path(work, split, f"{prefix}learned")),
        chunk=np.load(chunk) if (chunk := _path(work, split, f"{prefix}chunk")).exists() else None,
    )


def load_pairs(split: Split, work: WorkDir) -> Pairs:
    return Pairs(load(split, work), load(split, work, REJECTED))


def load_unpaired(split: Split, work: WorkDir) -> Unpaired:
    return Unpaired(load(split, work), np.load(_path(work, split, "desirable")))


def load_classes(split: Split, work: WorkDir, names: list[str]) -> Classes:
    """`names`: `PreparedData.classes`."""
    return Classes(load(split, work), np.load(_path(work, split, "label")), names)


def load_prompts(split: Split, work: WorkDir) -> Prompts:
    references = pq.read_table(work.data / f"{split}.reference.parquet").column("reference").to_pylist()
    return Prompts(load(split, work), references)


def load_slices(split: Split, work: WorkDir) -> list[str | None]:
    """(examples,): None where an example is in no slice."""
    found: list[str | None] = pq.read_table(work.data / f"{split}.slice.parquet").column("slice").to_pylist()
    return found


def _path(work: WorkDir, split: Split, part: str) -> Path:
    return work.data / f"{split}.{part}.npy"


def _column(shards: list[Shard], name: str, work: WorkDir, optional: bool = False) -> list[str | bool | None]:
    """`optional`: a shard may lack it, which then is one without a value in any row."""
    found: list[str | bool | None] = []
    for shard in shards:
        if optional and name not in pq.read_schema(work.shard(shard.key)).names:
            found += [None] * shard.rows
            continue
        values = pq.read_table(work.shard(shard.key), columns=[name]).column(name).to_pylist()
        if len(values) != shard.rows:
            raise FineTuneError(
                Reason.DATA_INVALID, f"{shard.key}: {len(values):,} rows; the index says {shard.rows:,}"
            )
        found += values
    return found


def _read(path: Path, shard: Shard, prefix: str, size: int) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
    """The values of both columns, and the end of each row."""
    table = pq.read_table(path, columns=[prefix + name for name in COLUMNS], memory_map=True)
    columns, ends = [], np.zeros(0, dtype=np.int64)
    for name in COLUMNS:
        lists = table.column(prefix + name).combine_chunks()
        columns.append(np.asarray(lists.flatten().to_numpy(), dtype=np.int32))
        bounds = lists.offsets.to_numpy().astype(np.int64)
        ends = bounds[1:] - bounds[0]
    if len(columns[0]) != size or len(columns[1]) != size or len(ends) != shard.rows:
        raise FineTuneError(
            Reason.DATA_INVALID,
            f"{shard.key}: {len(ends):,} rows and {len(columns[0]):,} tokens; the index says {shard.rows:,} and "
            f"{size:,}",
        )
    return columns, ends
