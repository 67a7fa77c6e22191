"""The time, by the API server's clock where this machine's clock differs from it.

What one operator writes, another one goes on with, and kubelets and controllers write times beside it: an operator
whose clock has jumped would end jobs by their deadlines, or start no next attempt for hours.
"""

import datetime
from email.utils import parsedate_to_datetime

TOLERATED = datetime.timedelta(seconds=5)
_ahead = datetime.timedelta()
"""How far the API server's clock is ahead of this machine's."""


def utc_now() -> datetime.datetime:
    """Whole seconds: the API server keeps no fractions, and what was read back must compare equal."""
    return (local_now() + _ahead).replace(microsecond=0)


def local_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def heard(date: str | None, asked: datetime.datetime, answered: datetime.datetime) -> None:
    """Takes note of an answer of the API server with this Date; `asked` and `answered` are of this machine's clock.
    However long an answer takes, its Date lies between them where the clocks agree."""
    global _ahead
    try:
        told = parsedate_to_datetime(date or "")
    except (ValueError, OverflowError):
        return
    if told.tzinfo is None:
        return
    agrees = asked - TOLERATED <= told <= answered + TOLERATED
    _ahead = datetime.timedelta() if agrees else told - answered
