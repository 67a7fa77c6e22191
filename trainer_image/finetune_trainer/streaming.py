"""Training data larger than a pod's disk: shards come when their turn comes, and go when it is over.

The arrays of `shards` are files of their full length here, too, but most of each is a hole that takes no room. The
tokens of a shard are written to their place before a step needs them, and the place is made a hole again afterwards:
whoever reads an array sees nothing of this. Shards belong to chunks, and the order of the rows goes from chunk to chunk
(`batches.Plan`): which they are, and in which order, follows from the index and the seed alone.
"""

import ctypes
import fcntl
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import Outline, PreparedData, RunConfig, Shard
from finetune_trainer import shards
from finetune_trainer.batches import WINDOW, Ints, Plan
from finetune_trainer.distributed import Ranks
from finetune_trainer.storage import Store, Wanted, join
from finetune_trainer.storage_errors import ObjectMissing
from finetune_trainer.workdir import WorkDir

AT_ONCE = 3
"""Chunks of each dataset that lie on the disk: one that is in use, the one after it, and one that others still read."""
_SHUFFLED = 20_250_102
"""Seed of what is in a chunk."""
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


class Place(NamedTuple):
    """Where a shard's tokens lie in the arrays of one side."""

    prefix: str
    start: int
    size: int


class Layout:
    """The training shards of an index, by number."""

    def __init__(self, index: PreparedData) -> None:
        self.outline = outline_of(index)
        self.shards = [shard for shard in index.shards if shard.split == "train"]
        sides = [("", [shard.tokens for shard in self.shards])]
        if index.kind == "Pairs":
            sides.append((shards.REJECTED, [shard.rejected_tokens for shard in self.shards]))
        starts = [(prefix, sizes, np.cumsum([0, *sizes]).tolist()) for prefix, sizes in sides]
        self.places = [
            [Place(prefix, start[number], sizes[number]) for prefix, sizes, start in starts]
            for number in range(len(self.shards))
        ]
        self.chunks = chunks_of(self.shards, self.outline.cache_bytes)

    def bytes_of(self, chunk: int) -> int:
        return sum(self.shards[number].decoded_bytes for number in self.chunks[chunk])

    def chunk_of_rows(self) -> Ints:
        """(examples,): the chunk that each lies in."""
        chunk = np.zeros(len(self.shards), dtype=np.int64)
        for number, members in enumerate(self.chunks):
            chunk[members] = number
        return np.repeat(chunk, [shard.rows for shard in self.shards])


def outline_of(index: PreparedData) -> Outline:
    assert index.outline is not None, "the data are not streamed"
    return index.outline


def chunks_of(found: Sequence[Shard], cache_bytes: int) -> list[list[int]]:
    """Numbers of shards by chunk: random ones of one dataset, few enough that AT_ONCE of each dataset fit."""
    datasets = list(dict.fromkeys(shard.dataset for shard in found))
    limit = cache_bytes // (AT_ONCE * max(1, len(datasets)))
    random = np.random.default_rng(_SHUFFLED)
    chunks: list[list[int]] = []
    for dataset in datasets:
        own = [number for number, shard in enumerate(found) if shard.dataset == dataset]
        room = 0
        for number in random.permutation(own).tolist():
            if found[number].decoded_bytes > room:
                chunks.append([])
                room = limit
            chunks[-1].append(number)
            room -= found[number].decoded_bytes
    return chunks


def lay_out(index: PreparedData, names: list[str], work: WorkDir) -> None:
    """What `shards.decode` writes, with holes for tokens; by one process of a pod. Raises DoesNotFit."""
    layout, outline = Layout(index), pq.read_table(work.shard(outline_of(index).key))
    rows = sum(shard.rows for shard in layout.shards)
    if len(outline) != rows:
        raise FineTuneError(
            Reason.DATA_INVALID, f"{layout.outline.key}: {len(outline):,} rows; the shards have {rows:,}"
        )
    known = shards.datasets_of(index, names, "train")
    dataset = np.repeat(
        [known.index(shard.dataset) for shard in layout.shards], [shard.rows for shard in layout.shards]
    )
    chunk = layout.chunk_of_rows()
    for place in layout.places[-1]:
        path = shards.make_arrays(work, "train", place.prefix, place.start + place.size)[0]
        _refuse_whole(path)
        lengths = _numbers(outline, f"{place.prefix}length")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        if offsets[-1] != place.start + place.size:
            raise FineTuneError(Reason.DATA_INVALID, f"{layout.outline.key}: its rows have another length")
        learned = _numbers(outline, f"{place.prefix}trained")
        shards.save_rows(work, "train", place.prefix, offsets, dataset, learned, chunk)
    shards.save_columns(index, "train", work, lambda name: outline.column(name).to_pylist())
    folder = _present(work)
    folder.mkdir(exist_ok=True)
    for stale in folder.iterdir():
        stale.unlink()


class Stream:
    """Called with a step, brings what it needs. One for each rank; the first of a pod fetches ahead and makes room."""

    def __init__(self, config: RunConfig, index: PreparedData, plan: Plan, work: WorkDir, ranks: Ranks) -> None:
        assert config.prepared is not None
        assert plan.rows.chunk is not None
        self._layout, self._plan, self._work = Layout(index), plan, work
        self._chunk: Ints = plan.rows.chunk
        self._uri = join(config.prepared.index_uri.rpartition("/")[0], work.stage).rstrip("/")
        self._store = Store(config.storage)
        self._window = -1
        self._last: set[int] = set()
        self._wanted: set[int] = set()
        # Looks ahead as far as a chunk of common size has rows: the one after this is seen in time.
        self._ahead = len(plan.rows) // len(self._layout.chunks) + WINDOW * plan.global_batch
        self._pool = ThreadPoolExecutor(1, "shards") if ranks.local_rank == 0 else None
        # Each rank of a pod begins at another shard, so that together they fetch several at a time.
        self._first = ranks.local_rank / config.devices.processes_per_worker

    def __call__(self, step: int) -> None:
        """Raises StorageUnavailable or, where a shard is not what `prepare` wrote, DataInvalid."""
        if self._plan.window_of(step) == self._window:
            return
        self._window = self._plan.window_of(step)
        coming = self._chunk[self._plan.coming(step, self._ahead)]
        needed = list(dict.fromkeys(coming[: WINDOW * self._plan.global_batch].tolist()))
        order = coming[np.sort(np.unique(coming, return_index=True)[1])].tolist()
        # Another rank of the pod may still be in the window before this one.
        kept = self._last | set(needed)
        self._last = set(needed)
        if self._pool:
            room = self._layout.outline.cache_bytes - sum(map(self._layout.bytes_of, kept))
            ahead = list(_while_room([chunk for chunk in order if chunk not in kept], self._layout, room))
            self._wanted = kept | set(ahead)
            self._make_room()
        for chunk in needed:
            self._fetch(chunk)
        if self._pool:
            self._pool.submit(self._fetch_ahead, ahead)

    def _fetch_ahead(self, chunks: list[int]) -> None:
        """Best effort: whoever needs a shard that is not there fetches it, and says what is wrong with it."""
        for chunk in chunks:
            self._fetch(chunk, ahead=True)

    def _fetch(self, chunk: int, ahead: bool = False) -> None:
        members = self._layout.chunks[chunk]
        first = int(self._first * len(members))
        for number in members[first:] + members[:first]:
            if ahead and chunk not in self._wanted:
                return
            with _locked(self._mark(number)) as mark:
                if not os.fstat(mark).st_size:
                    self._bring(number)
                    os.write(mark, b"1")

    def _bring(self, number: int) -> None:
        shard = self._layout.shards[number]
        path = self._work.shard(shard.key)
        try:
            self._store.download(Wanted(self._store.pin(join(self._uri, shard.key)), path, shard.sha256))
        except ObjectMissing as error:
            raise FineTuneError(Reason.DATA_INVALID, f"a shard of the prepared data is gone: {error}") from error
        for place in self._layout.places[number]:
            shards.write_tokens(self._work, "train", shard, place.prefix, place.start, place.size)
        path.unlink()

    def _make_room(self) -> None:
        for chunk, members in enumerate(self._layout.chunks):
            if chunk in self._wanted:
                continue
            for number in members:
                self._forget(number)

    def _forget(self, number: int) -> None:
        if not self._mark(number).exists():
            return
        with _locked(self._mark(number)) as mark:
            if not os.fstat(mark).st_size:
                return
            for place in self._layout.places[number]:
                for path in shards.token_paths(self._work, "train", place.prefix):
                    punch(path, shards.byte_of(path, place.start), shards.byte_of(path, place.start + place.size))
            os.ftruncate(mark, 0)

    def _mark(self, number: int) -> Path:
        return _present(self._work) / str(number)


def _while_room(chunks: list[int], layout: Layout, room: int) -> Iterator[int]:
    for chunk in chunks:
        room -= layout.bytes_of(chunk)
        if room < 0:
            return
        yield chunk


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A file that one process, or one thread of it, has at a time. Its content says whether the shard is there."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _present(work: WorkDir) -> Path:
    return work.data / "present"


def _numbers(table: pa.Table, name: str) -> NDArray[np.int64]:
    return np.asarray(table.column(name).to_numpy(), dtype=np.int64)


def punch(path: Path, start: int, stop: int) -> None:
    """Makes bytes [start, stop) of a file a hole, which reads as zeros and takes no room."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        if _fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, stop - start):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)


def _refuse_whole(path: Path) -> None:
    """Before training, not when the disk is full."""
    start = shards.byte_of(path, 0)
    try:
        punch(path, start, start + 1)
    except OSError as error:
        raise FineTuneError(
            Reason.DOES_NOT_FIT,
            f"the file system of the work volume has no holes in files ({error.strerror}), which training data larger "
            "than the profile's dataCache need; ext4, xfs, btrfs and tmpfs have",
        ) from error


_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
