"""Waiting for a condition, with a deadline and a report of what was seen instead."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(
    probe: Callable[[], Awaitable[T]],
    what: str,
    *,
    until: Callable[[T], object] = bool,
    timeout: float = 10.0,
    interval: float = 0.05,
) -> T:
    """The first value of `probe` that `until` accepts (by default any true one).

    An AssertionError in either means "not yet". When `timeout` seconds have passed, TimeoutError says `what` was waited
    for and which value (or assertion) was seen last.
    """
    deadline = time.monotonic() + timeout
    while True:
        seen: object
        try:
            value = await probe()
            seen = value
            if until(value):
                return value
        except AssertionError as error:
            seen = error
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {timeout:.0f} s; last seen: {seen!r}")
        await asyncio.sleep(interval)
