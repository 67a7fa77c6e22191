"""How long a store that fails is asked again: after growing pauses, within a budget, and then not any more.

In place of botocore's own rule, whose quota is one client's: sixteen parts at a time have spent it after a second of
trouble, and whose pauses for a 500 add up to one second.
"""

import random
import time
from collections import Counter
from typing import Any

from finetune_trainer.storage_errors import BROKEN, REFUSED_CREDENTIALS, RETRYABLE_CODES, is_passing

THROTTLED = {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}
FIRST_PAUSE, FIRST_PAUSE_THROTTLED, LONGEST_PAUSE = 0.1, 1.0, 20.0
"""Seconds, at most: each pause is a random part of that."""


def pause(failures: int, throttled: bool = False) -> float:
    """Seconds to wait after so many failures, from 1: exponential with full jitter."""
    first = FIRST_PAUSE_THROTTLED if throttled else FIRST_PAUSE
    return random.random() * min(LONGEST_PAUSE, first * 2.0 ** (failures - 1))


class Retries:
    """The budget of each request: `attempts` in all, and `seconds` from its first failure."""

    def __init__(self, attempts: int, seconds: float, renewable: bool) -> None:
        """`renewable`: refused credentials may be replaced while they are used."""
        self._attempts, self._seconds, self._renewable = attempts, seconds, renewable
        self._accepted = False
        self.repeated: Counter[str] = Counter()
        """By operation: how many requests were sent again, of which the first may have done its work."""

    def register(self, client: Any) -> None:
        """Of a client that was told to make one attempt."""
        client.meta.events.register("needs-retry.s3", self, unique_id="finetune-retries")

    def left(self, failures: int, since: float) -> bool:
        """Whether another attempt may be made, the first of `failures` having been at `since` (monotonic)."""
        return failures < self._attempts and time.monotonic() - since < self._seconds

    def __call__(
        self,
        response: tuple[Any, dict[str, Any]] | None,
        attempts: int,
        caught_exception: Exception | None,
        request_dict: dict[str, Any],
        operation: Any,
        **_: Any,
    ) -> float | None:
        """botocore's question after every answer: seconds to wait before the next attempt, None for no further one."""
        status, code = 0, ""
        if response is not None:
            status, code = response[0].status_code, str(response[1].get("Error", {}).get("Code", ""))
        if response is not None and status < 300 and not code:
            self._accepted = True
            return None
        since = request_dict["context"].setdefault("finetune_failing_since", time.monotonic())
        if not self.left(attempts, since):
            return None
        if self._renewable and self._accepted and code in REFUSED_CREDENTIALS:
            # They were good before: the Secret has been renewed, or will be, and its files follow in a minute or two.
            return pause(attempts, throttled=True)
        if isinstance(caught_exception, BROKEN) or is_passing(status, code) or code in RETRYABLE_CODES:
            self.repeated[operation.name] += 1
            return pause(attempts, throttled=code in THROTTLED or status == 429)
        return None
