"""The object store, never trusted to stand still: what is read is pinned first, what is written is hashed.

One `Store` serves a whole process; its methods may be called from any thread. Every error is a FineTuneError (see
`storage_errors`). Requests are retried by boto3, bodies that break off by a range that continues them.
"""

import builtins
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from pydantic import ValidationError

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PinnedObject, StorageConfig
from finetune_trainer.storage_errors import (
    BROKEN,
    AlreadyExists,
    changed,
    code_of,
    explain,
    is_precondition,
    status_of,
)

PART = 16 * 2**20
"""Bytes of one ranged GET and of one part of an upload."""
CHUNK = 2**20
PARTS_AT_ONCE = 16
FILES_AT_ONCE = 4
SCRATCH = re.compile(r"^s3://.+/\.scratch/[A-Za-z0-9][A-Za-z0-9-]*/$")

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int], None]
"""Called with the number of bytes that have newly arrived, from any thread."""


class Uploaded(NamedTuple):
    size: int
    sha256: str


class Wanted(NamedTuple):
    """One file to download; `sha256` is verified where it is known."""

    pinned: PinnedObject
    path: Path
    sha256: str | None = None


def parse(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b` -> `("bucket", "a/b")`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def join(prefix: str, key: str) -> str:
    return f"{prefix.rstrip('/')}/{key}"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    page_size = 1000
    """Keys asked for at a time."""

    def __init__(self, config: StorageConfig, *, attempts: int = 6, timeout: float = 60.0) -> None:
        """`attempts` is the budget of each request, and of each body without progress; `timeout` is in seconds."""
        self._config = config
        self._attempts = attempts
        # A session of its own: boto3's default one keeps the first credentials that it saw.
        self._client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=config.endpoint or os.environ.get("AWS_ENDPOINT_URL") or None,
            region_name=config.region
            or os.environ.get("AWS_REGION")
            or os.environ.get("AWS_DEFAULT_REGION")
            or "us-east-1",
            config=Config(
                max_pool_connections=2 * PARTS_AT_ONCE,
                connect_timeout=min(10.0, timeout),
                read_timeout=timeout,
                retries={"mode": "standard", "total_max_attempts": attempts},
                s3={"addressing_style": config.addressing_style},
                request_checksum_calculation=config.checksums,
                response_checksum_validation=config.checksums,
            ),
        )
        self._parts = ThreadPoolExecutor(PARTS_AT_ONCE, "s3-part")
        # "classic": the CRT client that "auto" may choose ignores endpoint_url.
        self._transfers: Any = create_transfer_manager(
            self._client,
            TransferConfig(
                multipart_threshold=PART,
                multipart_chunksize=PART,
                max_concurrency=PARTS_AT_ONCE // 2,
                preferred_transfer_client="classic",
            ),
        )

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._parts.shutdown(cancel_futures=True)
        self._transfers.shutdown(cancel=True)
        self._client.close()

    # Looking

    def list(self, uri: str) -> Iterator[PinnedObject]:
        """The objects below a prefix in the order of their keys, by ETag, without folder markers."""
        bucket, prefix = parse(uri)
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": self.page_size}
        )
        try:
            for page in pages:
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):
                        yield _pinned(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"], None)
        except (ClientError, BotoCoreError) as error:
            raise explain(error, "list", uri) from error

    def pin(self, uri: str) -> PinnedObject:
        """The object as it is now. Raises ObjectMissing."""
        bucket, key = parse(uri)
        try:
            answer = self._client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            raise self._why(error, uri) from error
        except BotoCoreError as error:
            raise explain(error, "read", uri) from error
        version = answer.get("VersionId")
        return _pinned(uri, answer["ContentLength"], answer["ETag"], None if version == "null" else version)

    def pin_all(self, uris: Sequence[str]) -> builtins.list[PinnedObject]:
        """Objects as they are now, in order."""
        return _each(self.pin, uris)

    def _why(self, error: ClientError, uri: str) -> FineTuneError:
        """A HEAD has no body and so no error code: a GET tells a missing bucket from a missing key."""
        bucket, key = parse(uri)
        try:
            self._client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
        except ClientError as told:
            if code_of(told) != "InvalidRange":
                return explain(told, "read", uri)
        except BotoCoreError as silent:
            return explain(silent, "read", uri)
        return explain(error, "read", uri)

    # Reading

    def get_bytes(self, what: str | PinnedObject, limit: int) -> bytes:
        """A small object whole. Raises DataInvalid where it is longer than `limit` bytes."""
        pinned = self.pin(what) if isinstance(what, str) else what
        if pinned.size > limit:
            raise FineTuneError(
                Reason.DATA_INVALID, f"{pinned.uri} has {pinned.size:,} bytes; at most {limit:,} are allowed"
            )
        return self.get_range(pinned, 0, pinned.size)

    def get_range(self, pinned: PinnedObject, start: int, length: int) -> bytes:
        with self.open_stream(pinned, start, start + length) as stream:
            return stream.read()

    def open_stream(self, pinned: PinnedObject, start: int = 0, end: int | None = None) -> BinaryIO:
        """The bytes `start` to `end` (exclusive) of what was pinned; a body that breaks off is continued."""
        stop = pinned.size if end is None else min(end, pinned.size)
        raw = _Body(self._client, pinned, start, stop, self._attempts)
        return cast(BinaryIO, io.BufferedReader(raw, CHUNK))

    def download(self, wanted: Wanted, progress: Progress | None = None) -> str:
        """Writes the pinned bytes to the path, whole or not at all, and returns their SHA-256."""
        pinned, path, expected = wanted
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        with partial.open("wb+") as file:
            file.truncate(pinned.size)
            futures = [
                self._parts.submit(self._fill, file.fileno(), pinned, start, progress)
                for start in range(0, pinned.size, PART)
            ]
            _all_or_first_error(futures)
            os.fsync(file.fileno())
        found = sha256_of(partial)
        if expected is not None and found != expected:
            partial.unlink()
            raise changed(pinned.uri, detail=f"SHA-256 {found[:12]}… instead of {expected[:12]}…")
        partial.rename(path)
        return found

    def download_many(self, files: Sequence[Wanted], progress: Progress | None = None) -> builtins.list[str]:
        """Downloads some files at a time and returns their SHA-256 in order."""
        return _each(lambda wanted: self.download(wanted, progress), files)

    def _fill(self, descriptor: int, pinned: PinnedObject, start: int, progress: Progress | None) -> None:
        with self.open_stream(pinned, start, start + PART) as stream:
            position = start
            while chunk := stream.read(CHUNK):
                os.pwrite(descriptor, chunk, position)
                position += len(chunk)
                if progress:
                    progress(len(chunk))

    # Writing

    def upload(self, path: Path, uri: str) -> Uploaded:
        """Writes a file, in parts where it is long; what was sent is checked by its size."""
        digest, size = sha256_of(path), path.stat().st_size
        bucket, key = parse(uri)
        try:
            # A failure aborts the multipart upload, so that no part stays behind and is paid for.
            self._transfers.upload(str(path), bucket, key, extra_args=self._encryption()).result()
        except (ClientError, BotoCoreError, OSError) as error:
            raise explain(error, "write", uri) from error
        stored = self.pin(uri)
        if stored.size != size:
            raise changed(uri, "write", f"{stored.size:,} bytes are there, {size:,} were sent")
        return Uploaded(size, digest)

    def put_bytes(self, uri: str, data: bytes) -> None:
        self._put(uri, data)

    def put_if_absent(self, uri: str, data: bytes) -> None:
        """Writes an object that must not be there yet; the same bytes already there are success: an answer was lost.

        Raises AlreadyExists.
        """
        for attempt in range(self._attempts):
            try:
                self._put(uri, data, IfNoneMatch="*")
                return
            except AlreadyExists:
                pinned = self.pin(uri)
                if pinned.size == len(data) and self.get_bytes(pinned, len(data)) == data:
                    return
                raise
            except _Conflict:
                time.sleep(min(2.0, 0.1 * 2**attempt))
        raise FineTuneError(Reason.STORAGE_UNAVAILABLE, f"cannot write {uri}: other writers kept coming in between")

    def _put(self, uri: str, data: bytes, **condition: str) -> None:
        bucket, key = parse(uri)
        try:
            self._client.put_object(Bucket=bucket, Key=key, Body=data, **condition, **self._encryption())
        except ClientError as error:
            if condition and is_precondition(error):
                raise AlreadyExists(Reason.STORAGE_DENIED, f"cannot write {uri}: it exists already") from error
            if condition and status_of(error) == 409:
                raise _Conflict from error
            raise explain(error, "write", uri) from error
        except BotoCoreError as error:
            raise explain(error, "write", uri) from error

    def _encryption(self) -> dict[str, str]:
        if self._config.kms_key_id is None:
            return {}
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self._config.kms_key_id}

    # Deleting

    def delete(self, uri: str) -> None:
        bucket, key = parse(uri)
        try:
            self._client.delete_object(Bucket=bucket, Key=key)
        except (ClientError, BotoCoreError) as error:
            raise explain(error, "delete", uri) from error

    def delete_prefix(self, prefix: str, scratch: str) -> int:
        """Deletes everything below `prefix`, which must lie in one job's scratch prefix; returns how many objects."""
        if not SCRATCH.match(scratch) or not prefix.startswith(scratch) or not prefix.endswith("/"):
            raise ValueError(f"{prefix} is not a prefix within a job's scratch prefix ({scratch})")
        found = builtins.list(self.list(prefix))
        _each(lambda item: self.delete(item.uri), found)
        return len(found)


class _Conflict(Exception):
    """Another conditional write to the same key is under way."""


class _Body(io.RawIOBase):
    """Bytes of a pinned object; opens lazily, and again from where it stopped when the connection breaks."""

    def __init__(self, client: Any, pinned: PinnedObject, start: int, stop: int, attempts: int) -> None:
        super().__init__()
        self._client, self._pinned, self._position, self._stop = client, pinned, start, stop
        self._attempts = self._left = attempts
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while self._position < self._stop and len(view):
            try:
                if self._body is None:
                    self._body = self._open()
                data = self._body.read(min(len(view), self._stop - self._position))
                if data:
                    view[: len(data)] = data
                    self._position += len(data)
                    self._left = self._attempts
                    return len(data)
                failure: Exception = EOFError("the body ended early")
            except BROKEN as error:
                failure = error
            self._retry(failure)
        return 0

    def close(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
        super().close()

    def _open(self) -> Any:
        bucket, key = parse(self._pinned.uri)
        version = {"VersionId": self._pinned.version_id} if self._pinned.version_id else {}
        try:
            answer = self._client.get_object(
                Bucket=bucket,
                Key=key,
                IfMatch=self._pinned.etag,
                Range=f"bytes={self._position}-{self._stop - 1}",
                **version,
            )
        except ClientError as error:
            raise explain(error, "read", self._pinned.uri) from error
        # A store that ignores If-Match still says what it sends.
        if answer["ETag"] != self._pinned.etag:
            answer["Body"].close()
            raise changed(self._pinned.uri)
        if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            answer["Body"].close()
            raise FineTuneError(
                Reason.STORAGE_UNAVAILABLE, f"cannot read {self._pinned.uri}: the store ignored the range of a request"
            )
        return answer["Body"]

    def _retry(self, failure: Exception) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
        self._left -= 1
        if self._left <= 0:
            raise explain(failure, "read", self._pinned.uri) from failure
        time.sleep(min(5.0, 0.05 * 2 ** (self._attempts - self._left)))


def _pinned(uri: str, size: int, etag: str, version: str | None) -> PinnedObject:
    try:
        return PinnedObject(uri=uri, size=size, etag=etag, version_id=version)
    except ValidationError as error:
        raise FineTuneError(
            Reason.DATA_INVALID,
            f"{uri}: this key has characters that are not allowed (letters, digits and !_.*'()/=+@:,& - and space are)",
        ) from error


def _each(work: Callable[[T], R], items: Iterable[T]) -> "builtins.list[R]":
    """`work` on some items at a time; results in order, the first error raised."""
    with ThreadPoolExecutor(FILES_AT_ONCE, "s3-file") as pool:
        futures = [pool.submit(work, item) for item in items]
        _all_or_first_error(futures)
        return [future.result() for future in futures]


def _all_or_first_error(futures: Iterable[Future[Any]]) -> None:
    """Waits for all; the first error stops those that have not begun and is raised once the rest have ended."""
    done, pending = wait(futures, return_when=FIRST_EXCEPTION)
    for future in pending:
        future.cancel()
    wait(pending)
    for future in done:
        future.result()
