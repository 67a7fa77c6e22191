"""The shards of a split as arrays on disk, decoded once per pod and shared by its ranks through the page cache."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PreparedData, Shard, Split
from finetune_trainer.batches import Examples
from finetune_trainer.workdir import WorkDir

COLUMNS = ("input_ids", "labels")


def decode(index: PreparedData, names: list[str], split: Split, work: WorkDir) -> None:
    """Writes `data/<split>.<part>.npy`; by one process of a pod. `names`: the datasets, in the order of the spec."""
    shards = [shard for shard in index.shards if shard.split == split]
    tokens, rows = sum(shard.tokens for shard in shards), sum(shard.rows for shard in shards)
    # A memory-mapped array cannot be empty: one token more than there is.
    parts = {
        name: np.lib.format.open_memmap(_path(work, split, name), mode="w+", dtype=np.int32, shape=(tokens + 1,))
        for name in COLUMNS
    }
    offsets, dataset = np.zeros(rows + 1, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    token = row = 0
    for shard in shards:
        columns, ends = _read(work.shard(shard.key), shard)
        for name, values in zip(COLUMNS, columns, strict=True):
            parts[name][token : token + shard.tokens] = values
        offsets[row + 1 : row + 1 + shard.rows] = token + ends
        dataset[row : row + shard.rows] = names.index(shard.dataset)
        token, row = token + shard.tokens, row + shard.rows
    for array in parts.values():
        array.flush()
    np.save(_path(work, split, "offsets"), offsets)
    np.save(_path(work, split, "dataset"), dataset)


def load(split: Split, work: WorkDir) -> Examples:
    """What `decode` wrote; the tokens stay on disk until they are read."""
    return Examples(
        input_ids=np.load(_path(work, split, "input_ids"), mmap_mode="r"),
        labels=np.load(_path(work, split, "labels"), mmap_mode="r"),
        offsets=np.load(_path(work, split, "offsets")),
        dataset=np.load(_path(work, split, "dataset")),
    )


def _path(work: WorkDir, split: Split, part: str) -> Path:
    return work.data / f"{split}.{part}.npy"


def _read(path: Path, shard: Shard) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
    """The values of both columns, and the end of each row."""
    table = pq.read_table(path, columns=list(COLUMNS), memory_map=True)
    columns, ends = [], np.zeros(0, dtype=np.int64)
    for name in COLUMNS:
        lists = table.column(name).combine_chunks()
        columns.append(np.asarray(lists.flatten().to_numpy(), dtype=np.int32))
        bounds = lists.offsets.to_numpy().astype(np.int64)
        ends = bounds[1:] - bounds[0]
    if len(columns[0]) != shard.tokens or len(columns[1]) != shard.tokens or len(ends) != shard.rows:
        raise FineTuneError(
            Reason.DATA_INVALID,
            f"{shard.key}: {len(ends):,} rows and {len(columns[0]):,} tokens; the index says {shard.rows:,} and "
            f"{shard.tokens:,}",
        )
    return columns, ends
