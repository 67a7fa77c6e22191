"""Rows of files, with their places; the refusals are in the integration tests' table."""

import gzip
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.failures import FineTuneError
from finetune_trainer.data import readers
from finetune_trainer.data.readers import Row, kind_of, place, read_parquet, read_stream
from support.limited import limited


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


def test_a_row_of_a_csv_over_many_lines_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 1000)
    monkeypatch.setattr(readers, "ROW_SLACK", 0)
    with pytest.raises(FineTuneError, match=r"x\.csv line \d+: invalid CSV \(one row has more than 1,000 bytes"):
        list(read_stream(io.BytesIO(b"a,b\n1,2\n" + b'"\n",' * 1000), "s3://b/x.csv"))


def test_short_rows_of_a_csv_are_no_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_LIMIT", 1000)
    monkeypatch.setattr(readers, "ROW_SLACK", 0)
    assert len(list(read_stream(io.BytesIO(b"a,b\n" + b"1,2\n" * 1000), "s3://b/x.csv"))) == 1000


def test_empty_lines_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLANK", 1000)
    rows = read_stream(io.BytesIO(b'{"a": 1}\n' + b"\n" * 900 + b'{"a": 1}\n' + b"\n" * 1100), "s3://b/x.jsonl")
    with pytest.raises(FineTuneError, match=r"x\.jsonl line 1903: more than 1,000 empty lines follow each other"):
        list(rows)


def test_a_key_that_stands_twice_among_many_is_found_at_once() -> None:
    line = b"{" + b", ".join(b'"k%d": 1' % (i % 199_999) for i in range(200_000)) + b"}"
    ended = limited(lambda: [row.problem for row in read_stream(io.BytesIO(line), "s3://b/x.jsonl")], seconds=20)
    assert ended.answer == ["invalid JSON: the key 'k0' stands twice in one object"]


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a long line": ("x.jsonl.gz", lambda: packed(b'{"a": "', b"x" * 2**20, 300)),
    "long lines": ("x.jsonl.gz", lambda: packed(b"", b'{"a": "' + b"x" * 2**20 + b'"}\n', 300)),
    "many members": ("x.jsonl.gz", lambda: gzip.compress(b" " * 2**20) * 1024),
    "a long line in zstd": ("x.jsonl.zst", lambda: pa.compress(b"x" * 2**28, "zstd", asbytes=True) * 4),
    "a pattern of lists": ("x.jsonl", lambda: b'{"a": [' + b"[]," * 2_000_000 + b"[]]}\n"),
    "a value of a page that lies": ("x.parquet", lambda: lying()),
    "a value that is repeated": ("x.parquet", lambda: repeated()),
    "nothing, again and again": ("x.parquet", lambda: table(pa.table({"a": pa.nulls(50_000_000, pa.int8())}))),
    "lists in lists": ("x.parquet", lambda: table(pa.table({"a": [nested(60)]}))),
}


def packed(head: bytes, piece: bytes, times: int) -> bytes:
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as stream:
        stream.write(head)
        for _ in range(times):
            stream.write(piece)
    return file.getvalue()


def table(value: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(value, file, **options)
    return file.getvalue()


def repeated() -> bytes:
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["x" * 2**20]))
    return table(pa.table({"a": values}), dictionary_pagesize_limit=2**30)


def lying() -> bytes:
    """A page whose header says that it holds 2 GiB."""
    data = table(pa.table({"a": ["x" * 1000]}), use_dictionary=False, compression="snappy")
    start = data.index(b"\x15", 4)
    # A page's header begins with its kind and its unpacked size: a number of seven bits a byte.
    return data[: start + 3] + b"\xfe\xff\xff\xff\x0f" + data[start + 5 :]


def nested(depth: int) -> Any:
    value: Any = ["x"]
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(("name", "data"), BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_takes_little_time_and_memory(name: str, data: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data())

    def work() -> str:
        pa.set_memory_pool(pa.system_memory_pool())
        if name.endswith(".parquet"):
            rows = read_parquet(path, f"s3://b/{name}")
        else:
            rows = read_stream(cast(BinaryIO, path.open("rb")), f"s3://b/{name}")
        return f"{sum(1 for _ in rows)} rows"

    ended = limited(work, megabytes=900, seconds=60)
    # Refused, or read within the same bounds: what is only long is no bomb.
    assert re.match(r"FineTuneError: s3://b/x.*: |(1|300) rows$", ended.answer), ended.answer


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
