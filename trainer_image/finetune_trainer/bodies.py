"""The body of an object: one that breaks off, or hardly moves, is asked for again from where it stopped."""

import io
import time
from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError

from finetune_api.failures import FineTuneError, Reason
from finetune_api.run import PinnedObject
from finetune_trainer.retries import Retries, pause
from finetune_trainer.storage_errors import BROKEN, changed, explain

PROGRESS = 2**16
"""Bytes that must arrive within the timeout: fewer are a failure, and only as many make up for earlier ones."""


class Body(io.RawIOBase):
    """Bytes [start, stop) of a pinned object; opens lazily. `timeout`: seconds; `arrived` hears of bytes that came."""

    def __init__(
        self,
        client: Any,
        pinned: PinnedObject,
        start: int,
        stop: int,
        retries: Retries,
        timeout: float,
        arrived: Callable[[int], None],
    ) -> None:
        super().__init__()
        self._client, self._pinned, self._position, self._stop = client, pinned, start, stop
        self._retries, self._timeout, self._arrived = retries, timeout, arrived
        self._failures, self._failing_since = 0, 0.0
        self._moved_to, self._moved_at = start, 0.0
        self._answer: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        while self._position < self._stop and len(view):
            try:
                if self._answer is None:
                    self._answer, self._moved_at = self._open(), time.monotonic()
                # read() would wait until all of it is there, however slowly it comes.
                data = self._answer._raw_stream.read1(min(len(view), self._stop - self._position))
                if data:
                    view[: len(data)] = data
                    self._position += len(data)
                    self._arrived(len(data))
                    self._watch()
                    return len(data)
                failure: Exception = EOFError("the body ended early")
            except BROKEN as error:
                failure = error
            self._again(failure)
        return 0

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _watch(self) -> None:
        now = time.monotonic()
        if self._position - self._moved_to >= PROGRESS:
            self._moved_to, self._moved_at, self._failures = self._position, now, 0
        elif now - self._moved_at > self._timeout and self._position < self._stop:
            self._again(TimeoutError(f"fewer than {PROGRESS:,} bytes in {self._timeout:g} s"))

    def _again(self, failure: Exception) -> None:
        """Waits before the next attempt, or raises where the budget is spent."""
        self._hang_up()
        self._failures += 1
        if self._failures == 1:
            self._failing_since = time.monotonic()
        if not self._retries.left(self._failures, self._failing_since):
            raise explain(failure, "read", self._pinned.uri) from failure
        time.sleep(pause(self._failures))

    def _open(self) -> Any:
        bucket, _, key = self._pinned.uri.removeprefix("s3://").partition("/")
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
