"""Rows of files, with their places; the refusals are in the integration tests' table."""

import gzip
import io
from pathlib import Path

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
