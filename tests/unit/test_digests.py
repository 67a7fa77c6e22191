"""What was seen before, in a file: nothing is forgotten, nothing is found that was not there."""

import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest

from finetune_trainer.data import digests
from finetune_trainer.data.digests import SLOTS, Digests


def digest(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def test_what_was_added_is_found_with_its_tag_after_the_table_has_grown(tmp_path: Path) -> None:
    known = Digests(tmp_path / "seen")
    for number in range(30_000):
        known.add(digest(number), number % 3)
    # 16 buckets hold 8,192 at most: the table has grown more than once.
    assert os.fstat(known._file).st_size > 2 * 16 * 8 * SLOTS
    assert [known.find(digest(number)) for number in range(30_000)] == [number % 3 for number in range(30_000)]
    assert not any(known.find(digest(number)) is not None for number in range(30_000, 60_000))
    assert known.count == 30_000


def test_the_first_tag_stays(tmp_path: Path) -> None:
    known = Digests(tmp_path / "seen")
    known.add(digest(1), 2)
    known.add(digest(1), 0)
    assert (known.find(digest(1)), known.count) == (2, 1)


def test_digests_at_the_ends_of_the_range(tmp_path: Path) -> None:
    known = Digests(tmp_path / "seen")
    assert known.find(b"\0" * 16) is None
    for value in (b"\0" * 16, b"\xff" * 16):
        known.add(value, 1)
    assert [known.find(value) for value in (b"\0" * 16, b"\xff" * 16)] == [1, 1]


def test_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    known = Digests(tmp_path / "seen")
    known.add(digest(1))
    assert list(tmp_path.iterdir()) == []
    known.close()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand digests take 9 MB in a set."""
    monkeypatch.setattr(digests, "_COPIED", 8)
    known = Digests(tmp_path / "seen")
    tracemalloc.start()
    try:
        for number in range(100_000):
            known.add(digest(number))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert os.fstat(known._file).st_size < 24 * 100_000
