"""Rows of a file, one at a time, each with its place: .jsonl, .jsonl.gz, .jsonl.zst, .csv, .parquet.

A row that cannot be used is yielded with its problem, for the data policy to decide. A file that cannot be read on (cut
off, another encoding, not what its name says) raises DataInvalid with the line.
"""

import collections
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.failures import FineTuneError, Reason

EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".csv")
LINE_LIMIT = 16 * 2**20
"""Bytes of one line, so that a file without line ends does not fill the memory."""
RATIO, FREE = 200, 64 * 2**20
"""Text packs to a tenth or so: a file that gives more than RATIO bytes for one, after the first FREE, is a bomb."""
ROW_SLACK = 2**16
"""Bytes of a CSV file that are read before the row that they follow is told."""
COLUMNS = 10_000
"""Of a CSV or parquet file."""
BLANK = 4_000_000
"""Empty lines that follow each other: compressed they cost nothing, and reading them takes time."""
ROWS_FREE = 1_000_000
"""Rows of a parquet file that may take less than a byte each."""
DEPTH = 64
"""Lists and objects within each other in one row."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS left in place of a large one."""
_PARQUET_ROWS, _PARQUET_BYTES = 1024, 256 * 2**20
"""Of one batch: how many rows, and what they may be unpacked to."""


class Row(NamedTuple):
    number: int
    """Line of a text file, row of a parquet file; from 1."""
    value: dict[str, Any]
    problem: str = ""
    """Why there is no value."""


def kind_of(uri: str) -> str | None:
    """The extension that says how a file is read, or None."""
    return next((ext for ext in sorted(EXTENSIONS, key=len, reverse=True) if uri.lower().endswith(ext)), None)


def place(uri: str, number: int) -> str:
    return f"{uri} {'row' if kind_of(uri) == '.parquet' else 'line'} {number}"


def read_stream(stream: BinaryIO, uri: str) -> Iterator[Row]:
    """The rows of a text file."""
    kind = kind_of(uri)
    if kind == ".jsonl":
        return _jsonl(stream, uri)
    packed = _Counted(stream)
    if kind == ".jsonl.gz":
        return _jsonl(gzip.GzipFile(fileobj=packed), uri, packed)
    if kind == ".jsonl.zst":
        return _jsonl(io.BufferedReader(_Zstd(packed), 2**20), uri, packed)
    if kind == ".csv":
        return _csv(stream, uri)
    raise ValueError(f"{uri} is not read as a stream")


def read_parquet(path: Path, uri: str) -> Iterator[Row]:
    """The rows of a parquet file on disk: it is read from its end."""
    with path.open("rb") as begun:
        _refuse_pointer(begun.read(len(POINTER)), uri)
    try:
        with pq.ParquetFile(path) as file:
            packed, size, number = path.stat().st_size, 0, 0
            _refuse_bomb(packed, _unpacked(file.metadata), uri)
            _refuse_shape(file, packed, uri)
            for batch in file.iter_batches(batch_size=_batch_rows(path, file.metadata)):
                # A value that stands once in a dictionary stands in each of its rows now.
                own = sum(map(_size, batch.columns))
                size += own
                _refuse_bomb(packed, size, uri)
                for row in _rows(batch, number, own > LINE_LIMIT):
                    if row.value and own > LINE_LIMIT and _length(row.value) > LINE_LIMIT:
                        raise _unreadable(uri, row.number, f"the row has more than {LINE_LIMIT:,} bytes")
                    yield row
                number += batch.num_rows
    except MemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, None, f"it is not a readable parquet file ({_short(error)})") from error


def _rows(batch: pa.RecordBatch, before: int, one_by_one: bool) -> Iterator[Row]:
    """Values that Python does not know, such as text that is not UTF-8, are a problem of their row alone."""
    if not one_by_one:
        try:
            values = batch.to_pylist()
        except (ValueError, OverflowError, TypeError, pa.ArrowException):
            one_by_one = True
        else:
            yield from (Row(before + place, value) for place, value in enumerate(values, 1))
    if one_by_one:
        for place in range(batch.num_rows):
            try:
                yield Row(before + place + 1, batch.slice(place, 1).to_pylist()[0])
            except (ValueError, OverflowError, TypeError, pa.ArrowException) as error:
                yield Row(before + place + 1, {}, f"it has a value that cannot be read ({_short(error)})")


def _length(value: Any) -> int:
    """About as many bytes as a value has in JSON."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list | tuple) else 8


def _refuse_shape(file: pq.ParquetFile, packed: int, uri: str) -> None:
    """Raises DataInvalid for more columns or rows than a file of such a size can mean."""
    names = file.schema_arrow.names
    if len(names) > COLUMNS:
        raise _unreadable(uri, None, f"it has {len(names):,} columns; at most {COLUMNS:,} are allowed")
    if len(set(names)) < len(names):
        twice = next(name for name, count in collections.Counter(names).items() if count > 1)
        raise _unreadable(uri, None, f"the column {twice!r} stands twice; each must have a name of its own")
    if (rows := file.metadata.num_rows) > ROWS_FREE + packed:
        raise _unreadable(uri, None, f"it has {rows:,} rows in {packed:,} bytes; a row takes at least a byte")


def _unpacked(metadata: Any) -> int:
    """Bytes of all pages, by what the file says of them."""
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


def _size(column: pa.Array) -> int:
    """Bytes of its values, each counted as often as it stands there."""
    return int((column.dictionary_decode() if pa.types.is_dictionary(column.type) else column).nbytes)


def _refuse_bomb(packed: int, size: int, uri: str, number: int | None = None) -> None:
    if size > FREE + RATIO * packed:
        raise _unreadable(
            uri, number, f"{packed:,} bytes were unpacked to {size:,}; more than {RATIO} to one are refused"
        )


def _batch_rows(path: Path, metadata: Any) -> int:
    """Rows of a batch: a row may hold all that a dictionary holds."""
    largest = 0
    with path.open("rb") as stream:
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            largest = max(largest, group.total_byte_size // max(1, group.num_rows))
            columns = [group.column(place) for place in range(group.num_columns)]
            offsets = [column.dictionary_page_offset for column in columns if column.has_dictionary_page]
            largest = max(largest, sum(_page_size(stream, offset) for offset in offsets))
    return max(1, min(_PARQUET_ROWS, _PARQUET_BYTES // max(1, largest)))


def _page_size(stream: BinaryIO, offset: int) -> int:
    """Unpacked bytes of the page whose header stands there: the second number of a struct in Thrift's compact form."""
    stream.seek(offset)
    header = iter(stream.read(32))
    value = 0
    for _ in range(2):
        # A field's head, then its number: seven bits a byte, the lowest first, the sign in the last bit.
        next(header, None)
        value, shift = 0, 0
        for byte in header:
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
    return value >> 1


class _Counted(io.RawIOBase):
    """A stream that knows how much was read of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.count = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


class _Zstd(io.RawIOBase):
    """pyarrow's decompressor as a stream that can read lines."""

    def __init__(self, stream: BinaryIO | _Counted) -> None:
        self._source = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _jsonl(stream: Any, uri: str, packed: _Counted | None = None) -> Iterator[Row]:
    number = size = blank = 0
    while True:
        try:
            line: bytes = stream.readline(LINE_LIMIT + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError, pa.ArrowException) as error:
            raise _unreadable(uri, number + 1, f"the compressed data end or break here ({_short(error)})") from error
        if not line:
            return
        number, size = number + 1, size + len(line)
        if packed:
            _refuse_bomb(packed.count, size, uri, number)
        if len(line) > LINE_LIMIT:
            raise _unreadable(uri, number, f"the line has more than {LINE_LIMIT:,} bytes; one JSON object is expected")
        if number == 1:
            line = _without_mark(line, uri)
        if line.strip():
            blank = 0
            yield _object(line, number)
        elif (blank := blank + 1) > BLANK:
            raise _unreadable(uri, number, f"more than {BLANK:,} empty lines follow each other")


def _object(line: bytes, number: int) -> Row:
    try:
        # Without its end, so that an error at the end of the line is told in the line's own columns.
        value = json.loads(line.decode().rstrip(), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return Row(number, {}, f"byte {error.start + 1} is not UTF-8")
    except json.JSONDecodeError as error:
        return Row(number, {}, f"invalid JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        return Row(number, {}, f"invalid JSON: {_short(error)}")
    except RecursionError:
        return Row(number, {}, _TOO_DEEP)
    if not isinstance(value, dict):
        return Row(number, {}, f"found {_kind(value)}; each line must be one JSON object")
    if line.count(b"{") + line.count(b"[") > DEPTH and _too_deep(value):
        return Row(number, {}, _TOO_DEEP)
    return Row(number, value)


_TOO_DEEP = f"invalid JSON: lists and objects lie in more than {DEPTH} others"


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH):
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r:.100} stands twice in one object")
    return value


def _without_mark(line: bytes, uri: str) -> bytes:
    """A first line without UTF-8's byte order mark. Raises where the file is in another encoding."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in line[:64]:
        raise _unreadable(uri, 1, "the file is UTF-16 or UTF-32; it must be UTF-8")
    _refuse_pointer(line, uri)
    return line.removeprefix(b"\xef\xbb\xbf")


def _refuse_pointer(data: bytes, uri: str) -> None:
    if data.startswith(POINTER):
        raise _unreadable(uri, None, "the file is a pointer of Git LFS; upload the data that it stands for")


def _csv(stream: BinaryIO, uri: str) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT)
    lines = _Lines(stream, uri)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if not header or len(set(header)) != len(header) or not all(name.strip() for name in header):
            raise _unreadable(uri, 1, "the first line must name the columns, each once, separated by commas")
        if len(header) > COLUMNS:
            raise _unreadable(uri, 1, f"it names {len(header):,} columns; at most {COLUMNS:,} are allowed")
        lines.size = 0
        for values in reader:
            lines.size = 0
            if not values:
                continue
            if len(values) != len(header):
                yield Row(reader.line_num, {}, f"found {len(values)} fields; the first line names {len(header)}")
            else:
                yield Row(reader.line_num, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise _unreadable(uri, reader.line_num, f"invalid CSV ({error})") from error


class _Lines:
    """The lines of a CSV file: a row may have several, and all of them together no more bytes than one may have."""

    def __init__(self, stream: BinaryIO, uri: str) -> None:
        self._stream, self._uri, self._number = stream, uri, 0
        self.size = 0
        """Bytes since the last row."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if not (line := self._stream.readline(LINE_LIMIT + 1)):
            raise StopIteration
        self._number += 1
        self.size += len(line)
        if len(line) > LINE_LIMIT:
            raise _unreadable(self._uri, self._number, f"the line has more than {LINE_LIMIT:,} bytes")
        if self.size > LINE_LIMIT + ROW_SLACK:
            raise _unreadable(self._uri, self._number, f"invalid CSV (one row has more than {LINE_LIMIT:,} bytes)")
        if self._number == 1:
            line = _without_mark(line, self._uri)
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise _unreadable(self._uri, self._number, f"byte {error.start + 1} of the line is not UTF-8") from error


def _unreadable(uri: str, number: int | None, why: str) -> FineTuneError:
    return FineTuneError(Reason.DATA_INVALID, f"{uri if number is None else place(uri, number)}: {why}")


def _short(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
