"""GPU-hours that a namespace may spend in a period under a profile: what has been spent, and when it begins anew.

A CPU process counts as a GPU where a profile has none. Periods are the calendar's, in UTC; weeks begin on Monday.
"""

import datetime
from typing import NamedTuple

from finetune_api.profile import Budget, FineTuneProfile, Usage

HOUR = 3600.0


class Account(NamedTuple):
    """A namespace's budget at a time, in GPU-hours."""

    allowed: float
    spent: float
    expected: float
    """What its running jobs are expected to spend still, as far as that is known."""
    ends: datetime.datetime
    """When the next period begins."""

    def __str__(self) -> str:
        return f"{told(self.spent)} of {told(self.allowed)} GPU-hours are spent"


def account(profile: FineTuneProfile, namespace: str, now: datetime.datetime) -> Account | None:
    """By the profile's status, which is some seconds behind; None: the profile has no budget."""
    budget = profile.spec.budget
    if budget is None:
        return None
    usage = current(profile.status.usage.get(namespace), budget, now)
    _, ends = period(budget, now)
    return Account(budget.gpu_hours, usage.gpu_seconds / HOUR, usage.expected_gpu_seconds / HOUR, ends)


def current(usage: Usage | None, budget: Budget, now: datetime.datetime) -> Usage:
    """The usage in the period of `now`: nothing, where what is known is of an earlier one."""
    since, _ = period(budget, now)
    return usage if usage and usage.since == since else Usage(since=since, until=since)


def period(budget: Budget, now: datetime.datetime) -> tuple[datetime.datetime, datetime.datetime]:
    """Begin and end of the one that `now` lies in."""
    day = now.astimezone(datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match budget.period:
        case "Day":
            return day, day + datetime.timedelta(days=1)
        case "Week":
            since = day - datetime.timedelta(days=day.weekday())
            return since, since + datetime.timedelta(days=7)
        case "Month":
            since = day.replace(day=1)
            return since, (since + datetime.timedelta(days=31)).replace(day=1)


def told(hours: float) -> str:
    """Rounded, so that what says it need not be written anew each minute."""
    return f"{hours:.3g}" if hours < 100 else f"{hours:.0f}"
