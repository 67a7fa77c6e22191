"""Rows of files, with their places; the refusals are in the integration tests' table."""

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.failures import FineTuneError
from finetune_trainer.data import readers
from finetune_trainer.data.readers import Row, kind_of, place, read_parquet, read_stream


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("s3://b/x.jsonl", ".jsonl"),
        ("s3://b/x.JSONL.GZ", ".jsonl.gz"),
        ("s3://b/x.csv", ".csv"),
        ("s3://b/x.json", None),
        ("s3://b/x.csv.gz", None),
        ("s3://b/jsonl", None),
    ],
)
def test_the_name_says_how_a_file_is_read(uri: str, kind: str | None) -> None:
    assert kind_of(uri) == kind


def test_lines_keep_their_numbers_over_blank_and_broken_ones() -> None:
    data = b'\xef\xbb\xbf{"a": 1}\n\n  \nnull\n{"a": 2}'
    rows = list(read_stream(io.BytesIO(data), "s3://b/x.jsonl"))
    assert rows == [Row(1, {"a": 1}), Row(4, {}, "found null; each line must be one JSON object"), Row(5, {"a": 2})]


def test_deep_nesting_is_a_broken_row_and_not_a_crash() -> None:
    row = next(read_stream(io.BytesIO(b"[" * 100_000), "s3://b/x.jsonl"))
    assert row.problem.startswith("invalid JSON")


def test_a_line_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 1000)
    data = gzip.compress(b'{"a": "' + b"x" * 10_000_000)
    with pytest.raises(FineTuneError, match=r"x\.jsonl\.gz line 1: the line has more than 1,000 bytes"):
        list(read_stream(io.BytesIO(data), "s3://b/x.jsonl.gz"))


class Endless(io.RawIOBase):
    """A file of a gigabyte in one line, which knows how much of it was read."""

    count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), 2**30 - self.count)
        buffer[:size] = b"x" * size
        self.count += size
        return size


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_of_a_line_of_a_gigabyte_only_the_beginning_is_read(name: str) -> None:
    stream = Endless()
    with pytest.raises(FineTuneError, match=r"line 1: the line has more than 16,777,216 bytes"):
        list(read_stream(cast(BinaryIO, io.BufferedReader(stream, 2**20)), f"s3://b/{name}"))
    assert stream.count <= readers.LINE_LIMIT + 2 * 2**20


def test_fields_of_a_csv_may_hold_line_ends_and_quotes() -> None:
    data = b'prompt,completion\r\n"a\nb","say ""hi"""\r\nc,d\r\n'
    rows = list(read_stream(io.BytesIO(data), "s3://b/x.csv"))
    assert [row.value for row in rows] == [
        {"prompt": "a\nb", "completion": 'say "hi"'},
        {"prompt": "c", "completion": "d"},
    ]
    assert rows[1].number == 4


def test_parquet_rows_are_numbered_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_PARQUET_ROWS", 2)
    pq.write_table(pa.Table.from_pylist([{"a": i} for i in range(5)]), tmp_path / "x.parquet")
    rows = list(read_parquet(tmp_path / "x.parquet", "s3://b/x.parquet"))
    assert [(row.number, row.value["a"]) for row in rows] == [(i + 1, i) for i in range(5)]
    assert place("s3://b/x.parquet", 3) == "s3://b/x.parquet row 3"


def test_a_parquet_file_of_pages_that_unpack_enormously_is_refused_unread(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x" * 2**20 + str(i) for i in range(100)]})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(
        FineTuneError, match=r"^s3://b/x\.parquet: [\d,]+ bytes were unpacked to 104,8\d\d,\d+; more than"
    ):
        next(read_parquet(tmp_path / "x.parquet", "s3://b/x.parquet"))


def test_a_parquet_file_that_says_one_long_value_again_and_again_is_refused(tmp_path: Path) -> None:
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * 2**20]))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": values}), path, dictionary_pagesize_limit=2**30)
    assert path.stat().st_size < 2**20
    with pq.ParquetFile(path) as file:
        # 2 GiB in all: a batch must not be the one that is too large.
        assert readers._batch_rows(path, file.metadata) == 255
    rows = read_parquet(path, "s3://b/x.parquet")
    with pytest.raises(FineTuneError, match="more than 200 to one are refused"):
        for _ in rows:
            pass


def test_a_prompt_that_stands_in_every_row_is_no_bomb(tmp_path: Path) -> None:
    rows = [{"system": "You are a helpful bot. " * 20, "prompt": f"question {i}"} for i in range(20_000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", compression="zstd")
    found = [row.value for row in read_parquet(tmp_path / "x.parquet", "s3://b/x.parquet")]
    assert found == rows
