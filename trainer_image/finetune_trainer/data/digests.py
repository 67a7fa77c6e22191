"""Which contents were seen before: a hash table in a file, so that memory does not grow with the rows.

62 bits of a content hash and a tag of 2 bits take 8 bytes in a bucket; the table takes 10 to 20 bytes a row on the disk
and, but for one bucket, nothing in memory. Among n rows two different ones are taken for equal with a probability of
n² / 2^63: one in a thousand for a hundred million rows.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SLOTS = 512
"""Of a bucket: one page."""
_BYTES = 8 * SLOTS
_TAG = 0b11
_COPIED = 256
"""Buckets that are split at a time when the table grows."""


class Digests:
    """The first bits of a digest are the number of its bucket. A bucket that is full doubles the table."""

    def __init__(self, path: Path) -> None:
        """The file is written anew; it is gone once the process ends, however it ends."""
        self._path = path
        self._bits = 4
        self._file = self._create()
        self.count = 0

    def find(self, digest: bytes) -> int | None:
        """The tag that `digest` was added with."""
        value = int.from_bytes(digest[:8], "big")
        bucket, _ = self._bucket(value)
        # What differs in the tag alone is equal: tags start at 1, since 0 is an empty slot.
        found = bucket[(bucket ^ np.uint64(value)) <= _TAG]
        tags = found & np.uint64(_TAG)
        return int(tags[0]) - 1 if len(tags) and tags[0] else None

    def add(self, digest: bytes, tag: int = 0) -> None:
        """`tag`: 0 to 2. A digest that is there already keeps the tag that it has."""
        if self.find(digest) is not None:
            return
        value = int.from_bytes(digest[:8], "big")
        bucket, start = self._bucket(value)
        used = int(np.count_nonzero(bucket))
        while used == SLOTS:
            self._grow()
            bucket, start = self._bucket(value)
            used = int(np.count_nonzero(bucket))
        os.pwrite(self._file, (value & ~_TAG | tag + 1).to_bytes(8, "little"), start + 8 * used)
        self.count += 1

    def close(self) -> None:
        os.close(self._file)

    def _create(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._path.unlink()
        os.ftruncate(descriptor, _BYTES << self._bits)
        return descriptor

    def _bucket(self, value: int) -> tuple[NDArray[np.uint64], int]:
        """The slots where `value` would be, and their place in the file."""
        start = (value >> 64 - self._bits) * _BYTES
        return np.frombuffer(os.pread(self._file, _BYTES, start), dtype="<u8"), start

    def _grow(self) -> None:
        """Each bucket becomes two, which stand where it stood: one pass from the beginning to the end."""
        old, buckets = self._file, 1 << self._bits
        self._bits += 1
        self._file = self._create()
        bit = np.uint64(64 - self._bits)
        for start in range(0, buckets, _COPIED):
            many = np.frombuffer(os.pread(old, _COPIED * _BYTES, start * _BYTES), dtype="<u8").reshape(-1, SLOTS)
            upper = (many >> bit) & np.uint64(1)
            halves = np.stack([np.where((many != 0) & (upper == side), many, 0) for side in (0, 1)], axis=1)
            # What is used comes first in its bucket.
            halves = np.take_along_axis(halves, np.argsort(halves == 0, axis=2, kind="stable"), axis=2)
            os.pwrite(self._file, halves.astype("<u8").tobytes(), 2 * start * _BYTES)
        os.close(old)
