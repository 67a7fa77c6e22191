"""Who may start a gang now, where no queue decides that: limits of a namespace, and a fair order between namespaces.

No I/O and no clock. It is all in memory: what holds GPUs and what waits for them is learnt anew from the first look at
all jobs, so that a restart loses nothing but who was served last.
"""

import datetime
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from finetune_api.profile import Concurrency

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""
NO_LIMITS = Concurrency()
_NEVER = datetime.datetime.min.replace(tzinfo=datetime.UTC)


class Claim(NamedTuple):
    """GPUs that a job holds, or waits for."""

    key: Key
    profile: str
    gpus: int
    since: datetime.datetime
    """When the job was created."""
    holds: bool
    served: datetime.datetime | None = None
    """When its newest gang was asked for."""
    limits: Concurrency = NO_LIMITS

    @property
    def namespace(self) -> str:
        return self.key[0]


@dataclass
class _Book:
    """What is known under one profile."""

    holds: dict[Key, Claim] = field(default_factory=dict)
    waits: dict[Key, Claim] = field(default_factory=dict)
    served: dict[str, datetime.datetime] = field(default_factory=dict)
    """When each namespace last was."""
    limits: Concurrency = NO_LIMITS
    ready: list[Key] | None = None
    """Who of those that wait may start now; None: it is to be found out."""

    def turns(self) -> list[Key]:
        if self.ready is None:
            self.ready = turns(self.holds.values(), self.waits.values(), self.served, self.limits)
        return self.ready


class Line:
    """All claims. Ask it and tell it without awaiting anything in between: then two jobs never take the same place."""

    def __init__(self) -> None:
        self._books: dict[str, _Book] = {}
        self._profiles: dict[Key, str] = {}
        """Of the claims that are known."""
        self._told: dict[str, set[Key]] = {}
        """By profile."""

    def note(self, key: Key, claim: Claim | None) -> None:
        """How a job stands; None: it holds nothing and waits for nothing."""
        known = self._books.get(self._profiles.pop(key, ""))
        if known is not None:
            before = known.holds.pop(key, None) or known.waits.pop(key, None)
            known.ready = known.ready if before == claim else None
        if claim is None:
            return
        book = self._books.setdefault(claim.profile, _Book())
        self._profiles[key] = claim.profile
        book.ready = book.ready if known is book else None
        (book.holds if claim.holds else book.waits)[key] = claim
        if claim.served:
            book.served[claim.namespace] = max(claim.served, book.served.get(claim.namespace, _NEVER))
        if not claim.holds and book.limits != claim.limits:
            book.limits, book.ready = claim.limits, None

    def why_not(self, claim: Claim) -> str | None:
        """Why a job must wait that wants to start; None: it may."""
        book = self._books.get(claim.profile, _Book())
        holds = {key: other for key, other in book.holds.items() if key != claim.key}
        if book.waits.get(claim.key) == claim and book.limits == claim.limits:
            ready = book.turns()
        else:
            waits = book.waits | {claim.key: claim}
            ready = turns(holds.values(), waits.values(), book.served, claim.limits)
        if claim.key in ready:
            return None
        return _blocked(claim, *held(holds.values())) or (
            f"earlier jobs, or those of namespaces that use less, come first for the {claim.limits.gpus} GPUs that "
            f"profile {claim.profile!r} lets be used at a time"
        )

    def profiles(self) -> list[str]:
        return list(self._books)

    def ready(self, profile: str) -> list[Key]:
        """Jobs that wait under a profile and might start by now; each is told once, until it is no longer so."""
        found = set(self._books[profile].turns())
        new = sorted(found - self._told.get(profile, set()))
        self._told[profile] = found
        return new


def held(claims: Iterable[Claim]) -> tuple[Counter[str], Counter[str]]:
    """Jobs and GPUs by namespace."""
    jobs: Counter[str] = Counter()
    gpus: Counter[str] = Counter()
    for claim in claims:
        jobs[claim.namespace] += 1
        gpus[claim.namespace] += claim.gpus
    return jobs, gpus


def turns(
    holds: Iterable[Claim], waits: Iterable[Claim], served: Mapping[str, datetime.datetime], limits: Concurrency
) -> list[Key]:
    """Who of those that wait may start now, in their order.

    The namespace that holds least comes next, of equals the one that was served longest ago; in a namespace the oldest
    job. Where the next one finds no room, nobody overtakes it: a large job would wait for ever. A namespace that is at
    its own limit keeps no other waiting.
    """
    jobs, gpus = held(holds)
    free = limits.gpus - gpus.total() if limits.gpus else None
    if free is not None and free <= 0:
        return []
    queues: dict[str, list[tuple[datetime.datetime, Key, Claim]]] = {}
    for claim in waits:
        queues.setdefault(claim.namespace, []).append((claim.since, claim.key, claim))
    for queue in queues.values():
        heapq.heapify(queue)
    found: list[Key] = []
    while heads := [queue[0][2] for queue in queues.values() if queue and not _blocked(queue[0][2], jobs, gpus)]:
        claim = min(heads, key=lambda c: (gpus[c.namespace], served.get(c.namespace, _NEVER), c.since, c.key))
        if free is not None:
            if claim.gpus > free:
                break
            free -= claim.gpus
        jobs[claim.namespace] += 1
        gpus[claim.namespace] += claim.gpus
        heapq.heappop(queues[claim.namespace])
        found.append(claim.key)
    return found


def _blocked(claim: Claim, jobs: Counter[str], gpus: Counter[str]) -> str | None:
    """Why its own namespace has enough."""
    limits, namespace = claim.limits, claim.namespace
    whose = f"profile {claim.profile!r} lets namespace {namespace!r}"
    if limits.jobs_per_namespace and jobs[namespace] >= limits.jobs_per_namespace:
        return f"{whose} run {_count(limits.jobs_per_namespace, 'job')} at a time"
    if limits.gpus_per_namespace and gpus[namespace] + claim.gpus > limits.gpus_per_namespace:
        return f"{whose} use {_count(limits.gpus_per_namespace, 'GPU')} at a time; {claim.gpus} more are too many"
    return None


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")
