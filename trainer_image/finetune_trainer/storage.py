"""The object store, never trusted to stand still: what is read is pinned first, what is written is hashed.

One `Store` serves a whole process; its methods may be called from any thread. Every error is a FineTuneError (see
`storage_errors`). Requests are sent again as `retries` says, bodies that break off by a range that continues them.
"""

import builtins
import datetime
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import ClientError
from pydantic import ValidationError

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PinnedObject, StorageConfig
from finetune_trainer import log
from finetune_trainer.bodies import Body
from finetune_trainer.credentials import RotatedCredentials, expiry_of, make_session
from finetune_trainer.retries import Retries
from finetune_trainer.storage_errors import (
    FAILED,
    AlreadyExists,
    changed,
    code_of,
    explain,
    is_precondition,
    of_disk,
)
from finetune_trainer.traffic import Moved, Traffic

PART = 16 * 2**20
"""Bytes of one ranged GET and of one part of an upload."""
CHUNK = 2**20
PARTS_AT_ONCE = 16
FILES_AT_ONCE = 4
UPLOADS = 3
"""How often a file is sent whose upload the store forgot."""
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

    def __init__(
        self,
        config: StorageConfig,
        *,
        attempts: int = 20,
        seconds: float = 180.0,
        timeout: float = 60.0,
        part: int = PART,
    ) -> None:
        """`attempts` and `seconds` are the budget of each request, and of each body without progress.

        `timeout`: seconds of silence; `part`: bytes of one part of an upload, 5 MiB at least.
        """
        self.kms_key_id = config.kms_key_id
        self._timeout, self._attempts = timeout, attempts
        # A session of its own: boto3's default one keeps the first credentials that it saw.
        self._session = make_session()
        credentials = self._session.get_credentials()
        self._retries = Retries(attempts, seconds, isinstance(credentials, RotatedCredentials))
        self._client: Any = self._session.client(
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
                retries={"mode": "standard", "total_max_attempts": 1},
                s3={"addressing_style": config.addressing_style},
                request_checksum_calculation=config.checksums,
                response_checksum_validation=config.checksums,
            ),
        )
        self._retries.register(self._client)
        self._traffic = Traffic.from_env()
        self._traffic.register(self._client)
        self.region = str(self._client.meta.region_name)
        self._parts = ThreadPoolExecutor(PARTS_AT_ONCE, "s3-part")
        # "classic": the CRT client that "auto" may choose ignores endpoint_url.
        self._transfers: Any = create_transfer_manager(
            self._client,
            TransferConfig(
                multipart_threshold=part,
                multipart_chunksize=part,
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
        self._traffic.close()

    @property
    def moved(self) -> Moved:
        """Bytes of objects that were read and written."""
        return self._traffic.moved

    def expiry(self) -> datetime.datetime | None:
        """Of `credentials.expiry_of`."""
        return expiry_of(self._session.get_credentials())

    # Looking

    def region_of(self, bucket: str) -> str | None:
        """None where the store does not say it; S3 does so even to those who may do nothing else."""
        try:
            answer = self._client.head_bucket(Bucket=bucket)
        except ClientError as error:
            answer = error.response
        except FAILED as error:
            raise explain(error, "reach", f"s3://{bucket}") from error
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        return str(headers["x-amz-bucket-region"]) if "x-amz-bucket-region" in headers else None

    def encryption_of(self, uri: str) -> str | None:
        """How an object is encrypted, as S3 names it ("aws:kms"); None where the store does not say it."""
        bucket, key = parse(uri)
        try:
            answer = self._client.head_object(Bucket=bucket, Key=key)
        except FAILED as error:
            raise explain(error, "read", uri) from error
        found = answer.get("ServerSideEncryption")
        return str(found) if found else None

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
        except FAILED as error:
            raise explain(error, "list", uri) from error

    def pin(self, uri: str) -> PinnedObject:
        """The object as it is now. Raises ObjectMissing."""
        bucket, key = parse(uri)
        for again in (True, False):
            try:
                answer = self._client.head_object(Bucket=bucket, Key=key)
                break
            except ClientError as error:
                why = self._why(error, uri)
                # What was true a moment ago may not be now: keys that were renewed in between, above all.
                if why is None and again:
                    continue
                raise (why or explain(error, "read", uri)) from error
            except FAILED as error:
                raise explain(error, "read", uri) from error
        version = answer.get("VersionId")
        return _pinned(uri, answer["ContentLength"], answer["ETag"], None if version == "null" else version)

    def pin_all(self, uris: Sequence[str]) -> builtins.list[PinnedObject]:
        """Objects as they are now, in order."""
        return _each(self.pin, uris)

    def _why(self, error: ClientError, uri: str) -> FineTuneError | None:
        """A HEAD has no body and so no error code: a GET tells a missing bucket from a missing key.

        None where there is nothing wrong any more.
        """
        bucket, key = parse(uri)
        try:
            self._client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
        except FAILED as told:
            if not (isinstance(told, ClientError) and code_of(told) == "InvalidRange"):
                return explain(told, "read", uri)
        return None

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
        raw = Body(self._client, pinned, start, stop, self._retries, self._timeout, self._traffic.read)
        return cast(BinaryIO, io.BufferedReader(raw, CHUNK))

    def download(self, wanted: Wanted, progress: Progress | None = None) -> str:
        """Writes the pinned bytes to the path, whole or not at all, and returns their SHA-256.

        Raises DoesNotFit where the disk is full.
        """
        pinned, path, expected = wanted
        partial = path.with_name(path.name + ".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(partial, pinned, progress)
            found = sha256_of(partial)
            if expected is not None and found != expected:
                raise changed(pinned.uri, detail=f"SHA-256 {found[:12]}… instead of {expected[:12]}…")
            partial.rename(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise of_disk(error, path) from error
        except FineTuneError:
            partial.unlink(missing_ok=True)
            raise
        return found

    def _write(self, path: Path, pinned: PinnedObject, progress: Progress | None) -> None:
        with path.open("wb+") as file:
            file.truncate(pinned.size)
            futures = [
                self._parts.submit(self._fill, file.fileno(), pinned, start, progress)
                for start in range(0, pinned.size, PART)
            ]
            _all_or_first_error(futures)
            os.fsync(file.fileno())

    def download_many(self, files: Sequence[Wanted], progress: Progress | None = None) -> builtins.list[str]:
        """Downloads some files at a time and returns their SHA-256 in order."""
        return _each(lambda wanted: self.download(wanted, progress), files)

    def _fill(self, descriptor: int, pinned: PinnedObject, start: int, progress: Progress | None) -> None:
        with self.open_stream(pinned, start, start + PART) as stream:
            position = start
            while chunk := stream.read(CHUNK):
                rest = memoryview(chunk)
                # A disk that is nearly full takes a part, and says so only the next time.
                while rest:
                    written = os.pwrite(descriptor, rest, position)
                    position, rest = position + written, rest[written:]
                if progress:
                    progress(len(chunk))

    # Writing

    def upload(self, path: Path, uri: str) -> Uploaded:
        """Writes a file, in parts where it is long; what was sent is checked by its size."""
        digest, size = sha256_of(path), path.stat().st_size
        begun = self._retries.repeated["CreateMultipartUpload"]
        for left in reversed(range(UPLOADS)):
            try:
                self._transfer(path, uri)
                break
            except FAILED as error:
                # The answer to its completion was lost, and the store does not know the upload any more.
                if left and isinstance(error, ClientError) and code_of(error) == "NoSuchUpload":
                    continue
                raise explain(error, "write", uri) from error
        # Of a beginning whose answer was lost nobody knows the number: it is found by its key.
        if self._retries.repeated["CreateMultipartUpload"] > begun:
            self._abort(uri, lambda key: key == parse(uri)[1])
        stored = self.pin(uri)
        if stored.size != size:
            raise changed(uri, "write", f"{stored.size:,} bytes are there, {size:,} were sent")
        return Uploaded(size, digest)

    def _transfer(self, path: Path, uri: str) -> None:
        """A failure aborts the multipart upload, so that no part stays behind and is paid for."""
        bucket, key = parse(uri)
        self._transfers.upload(str(path), bucket, key, extra_args=self._encryption()).result()

    def sweep_uploads(self, prefix: str) -> int:
        """Aborts the multipart uploads below `prefix` that nobody finished, and returns how many there were.

        None where the credentials do not allow to list them: what is left then is the bucket's lifecycle rule's.
        """
        key_prefix = parse(prefix)[1]
        if not key_prefix.strip("/") or not prefix.endswith("/"):
            raise ValueError(f"{prefix} is not the prefix of one job")
        return self._abort(prefix, lambda key: key.startswith(key_prefix))

    def _abort(self, uri: str, is_ours: Callable[[str], bool]) -> int:
        bucket, prefix = parse(uri)
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        count = 0
        try:
            # Some stores do not know a prefix here.
            found = [item for page in pages for item in page.get("Uploads", ()) if is_ours(item["Key"])]
            for item in found:
                try:
                    self._client.abort_multipart_upload(Bucket=bucket, Key=item["Key"], UploadId=item["UploadId"])
                    count += 1
                except ClientError as error:
                    if code_of(error) != "NoSuchUpload":
                        raise
        except FAILED as error:
            why = explain(error, "list the unfinished uploads of", uri)
            if why.reason != Reason.STORAGE_DENIED:
                raise why from error
            log.event("unfinished uploads are not looked for", level="warning", why=str(why))
        return count

    def put_bytes(self, uri: str, data: bytes) -> None:
        self._put(uri, data)

    def put_if_absent(self, uri: str, data: bytes) -> None:
        """Writes an object that must not be there yet; the same bytes already there are success: an answer was lost.

        Raises AlreadyExists.
        """
        try:
            self._put(uri, data, IfNoneMatch="*")
        except AlreadyExists:
            pinned = self.pin(uri)
            if pinned.size != len(data) or self.get_bytes(pinned, len(data)) != data:
                raise

    def _put(self, uri: str, data: bytes, **condition: str) -> None:
        bucket, key = parse(uri)
        try:
            self._client.put_object(Bucket=bucket, Key=key, Body=data, **condition, **self._encryption())
        except ClientError as error:
            if condition and is_precondition(error):
                raise AlreadyExists(Reason.STORAGE_DENIED, f"cannot write {uri}: it exists already") from error
            raise explain(error, "write", uri) from error
        except FAILED as error:
            raise explain(error, "write", uri) from error

    def _encryption(self) -> dict[str, str]:
        if self.kms_key_id is None:
            return {}
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key_id}

    # Deleting

    def delete(self, uri: str) -> None:
        bucket, key = parse(uri)
        try:
            self._client.delete_object(Bucket=bucket, Key=key)
        except FAILED as error:
            raise explain(error, "delete", uri) from error

    def delete_prefix(self, prefix: str, scratch: str, keep: str = "") -> int:
        """Deletes everything below `prefix`, which must lie in one job's scratch prefix; returns how many objects.

        `keep`: the last part of keys that stay.
        """
        if not SCRATCH.match(scratch) or not prefix.startswith(scratch) or not prefix.endswith("/"):
            raise ValueError(f"{prefix} is not a prefix within a job's scratch prefix ({scratch})")
        found = [item for item in self.list(prefix) if not keep or item.uri.rpartition("/")[2] != keep]
        _each(lambda item: self.delete(item.uri), found)
        return len(found)


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
