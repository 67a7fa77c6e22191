"""PURE. Which connections of a server are served, which wait, and which give way where there are more than it bears.

A connection waits, at no cost but a socket, until its first bytes are there; then it gets one of a bounded number of
seats. Where all are taken, the connection gives way that has said least for longest, of the address that holds most. A
caller whose identity was proven never does. So a server that is full of silent peers still answers who speaks at once.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from finetune_operator.buckets import Buckets


class Stage(IntEnum):
    """Who gives way first comes first."""

    SILENT = 0
    """Nothing was received yet."""
    WAITING = 1
    """Bytes are there, and no seat is."""
    GREETING = 2
    """Seated: the TLS handshake and the head of the request."""
    ASKING = 3
    """The head is complete, and the caller unknown."""
    ANSWERED = 4
    """The response is on its way."""
    PROVEN = 5
    """The caller is known, and its request is read and handled."""


@dataclass(frozen=True)
class Limits:
    """How much one server bears. Times are in seconds."""

    seats: int
    """Connections that are served at once: each takes some 60 KiB, which are for TLS."""
    seats_per_address: int
    waiting: int
    """Connections without a seat."""
    rate_per_address: float
    """New seats a second, in the long run; `burst_per_address` at once."""
    burst_per_address: float
    grace: float = 0.25
    """Nobody gives way earlier: a burst of callers who speak is queued, and does not push itself out."""


AT_ONCE = 16
"""Seats that are given before anything else has its turn: each begins with a millisecond of cryptography."""


@dataclass
class _Peer:
    number: int
    address: str
    since: float
    """When its stage began."""
    stage: Stage = Stage.SILENT


class Settled(NamedTuple):
    """What `Seats.settle` decided: who gets a seat, who is closed, and when to ask again."""

    seated: list[int]
    closed: list[int]
    again: float | None


class Seats:
    """Connections by a number that the caller gives; `now` is monotonic."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._silent: dict[int, _Peer] = {}
        self._waiting: dict[int, _Peer] = {}
        self._seated: dict[int, _Peer] = {}
        self._held: Counter[str] = Counter()
        """Connections of each address, and of those the seated ones."""
        self._held_seats: Counter[str] = Counter()
        self._rates = Buckets(limits.rate_per_address, limits.burst_per_address)

    def __len__(self) -> int:
        return len(self._silent) + len(self._waiting) + len(self._seated)

    def arrive(self, number: int, address: str, now: float) -> int | None:
        """Adds a connection. Returns the one that is closed for it, which may be itself; it has left by then."""
        victim = None
        if len(self._silent) + len(self._waiting) >= self.limits.waiting:
            victim = self._least(self._silent.values())
            if victim is None:
                return number
            self.leave(victim)
        self._silent[number] = _Peer(number, address, now)
        self._held[address] += 1
        return victim

    def speaks(self, number: int, now: float) -> None:
        """Its first bytes are there: `settle` gives it a seat."""
        peer = self._waiting[number] = self._silent.pop(number)
        peer.stage, peer.since = Stage.WAITING, now

    def advance(self, number: int, stage: Stage, now: float) -> None:
        """A seated connection reached a later stage. One that left meanwhile is none."""
        if peer := self._seated.get(number):
            peer.stage, peer.since = stage, now

    def leave(self, number: int) -> None:
        for peers in (self._silent, self._waiting, self._seated):
            if peer := peers.pop(number, None):
                _lower(self._held, peer.address)
                if peers is self._seated:
                    _lower(self._held_seats, peer.address)

    def settle(self, now: float) -> Settled:
        """Gives seats to those who wait, the first of the address that holds fewest first."""
        settled = Settled([], [], None)
        skipped: set[str] = set()
        while peer := self._next(skipped):
            if len(settled.seated) == AT_ONCE:
                return settled._replace(again=now)
            victim, later = self._room(peer.address, now)
            if later is None and (wait := self._rates.take(peer.address, now)):
                later = now + wait
            if later is not None:
                skipped.add(peer.address)
                settled = settled._replace(again=min(later, settled.again or later))
                continue
            if victim is not None:
                settled.closed.append(victim)
                self.leave(victim)
            self._seat(peer, now)
            settled.seated.append(peer.number)
        return settled

    def _next(self, skipped: set[str]) -> _Peer | None:
        waiting = (peer for peer in self._waiting.values() if peer.address not in skipped)
        return min(waiting, key=lambda peer: (self._held[peer.address], peer.since), default=None)

    def _room(self, address: str, now: float) -> tuple[int | None, float | None]:
        """Who gives way for one of this address, if somebody must; and when it is worth asking again, if nobody can."""
        crowded = self._held_seats[address] >= self.limits.seats_per_address
        if not crowded and len(self._seated) < self.limits.seats:
            return None, None
        among = [peer for peer in self._seated.values() if peer.address == address or not crowded]
        movable = [peer for peer in among if peer.stage is not Stage.PROVEN]
        victim = self._least(peer for peer in movable if now - peer.since >= self.limits.grace)
        if victim is not None:
            return victim, None
        first = min((peer.since for peer in movable), default=now)
        return None, max(first + self.limits.grace, now + 0.01)

    def _least(self, peers: Iterable[_Peer]) -> int | None:
        """Who gives way: by the address that holds most, the earliest stage, the longest time in it."""
        found = min(peers, key=lambda peer: (-self._held[peer.address], peer.stage, peer.since), default=None)
        return found.number if found else None

    def _seat(self, peer: _Peer, now: float) -> None:
        self._seated[peer.number] = self._waiting.pop(peer.number)
        self._held_seats[peer.address] += 1
        peer.stage, peer.since = Stage.GREETING, now


def _lower(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
