"""The shards of a split as arrays on disk, decoded once per pod and shared by its ranks through the page cache."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune_api.failures import FineTuneError, Reason
from finetune_api.formats import Kind
from finetune_api.run import PreparedData, Shard, Split
from finetune_trainer.batches import Examples
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
    match kind_of(index, split):
        case "Pairs":
            _decode(shards, [shard.rejected_tokens for shard in shards], known, split, REJECTED, work)
        case "Unpaired":
            found = [np.asarray(value, dtype=np.bool_) for value in _column(shards, "desirable", work)]
            np.save(_path(work, split, "desirable"), np.array(found, dtype=np.bool_))
        case "Classes":
            number = {name: place for place, name in enumerate(index.classes)}
            labels = [number[str(value)] for value in _column(shards, "label", work)]
            np.save(_path(work, split, "label"), np.array(labels, dtype=np.int64))
        case "Prompts":
            table = pa.table({"reference": pa.array(_column(shards, "reference", work), pa.string())})
            pq.write_table(table, work.data / f"{split}.reference.parquet")


def _decode(shards: list[Shard], sizes: list[int], known: list[str], split: Split, prefix: str, work: WorkDir) -> None:
    """The sequences whose columns begin with `prefix`; `sizes`: their tokens in each shard."""
    tokens, rows = sum(sizes), sum(shard.rows for shard in shards)
    # A memory-mapped array cannot be empty: one token more than there is.
    parts = {
        name: np.lib.format.open_memmap(
            _path(work, split, prefix + name), mode="w+", dtype=np.int32, shape=(tokens + 1,)
        )
        for name in COLUMNS
    }
    offsets, dataset = np.zeros(rows + 1, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    token = row = 0
    for shard, size in zip(shards, sizes, strict=True):
        columns, ends = _read(work.shard(shard.key), shard, prefix, size)
        for name, values in zip(COLUMNS, columns, strict=True):
            parts[name][token : token + size] = values
        offsets[row + 1 : row + 1 + shard.rows] = token + ends
        dataset[row : row + shard.rows] = known.index(shard.dataset)
        token, row = token + size, row + shard.rows
    for array in parts.values():
        array.flush()
    np.save(_path(work, split, f"{prefix}offsets"), offsets)
    np.save(_path(work, split, f"{prefix}dataset"), dataset)


def load(split: Split, work: WorkDir, prefix: str = "") -> Examples:
    """What `decode` wrote; the tokens stay on disk until they are read."""
    return Examples(
        input_ids=np.load(_path(work, split, f"{prefix}input_ids"), mmap_mode="r"),
        labels=np.load(_path(work, split, f"{prefix}labels"), mmap_mode="r"),
        offsets=np.load(_path(work, split, f"{prefix}offsets")),
        dataset=np.load(_path(work, split, f"{prefix}dataset")),
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
