"""PURE. Which connections of a server are served, which wait, and which give way where there are more than it bears.

A connection waits, at no cost but a socket, until its first bytes are there; then it gets one of a bounded number of
seats. Where all are taken, the connection gives way that has said least for longest, of the address that holds most. A
caller whose identity was proven never does. So a server that is full of silent peers still answers who speaks at once.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
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
    """Connections that are served at once: each has buffers for TLS of some 300 KiB."""
    seats_per_address: int
    waiting: int
    """Connections without a seat."""
    rate_per_address: float
    """New seats a second, in the long run; `burst_per_address` at once."""
    burst_per_address: float
    grace: float = 0.25
    """Nobody gives way earlier: a burst of callers who speak is queued, and does not push itself out."""


@dataclass
class _Peer:
    address: str
    since: float
    """When its stage began."""
    stage: Stage = Stage.SILENT


class Settled(NamedTuple):
    """What `Seats.settle` decided: who gets a seat, who is closed, and when to ask again."""

    seated: list[int]
    closed: list[int]
    again: float | None


@dataclass
class Seats:
    """Connections by a number that the caller gives; `now` is monotonic."""

    limits: Limits
    peers: dict[int, _Peer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._rates = Buckets(self.limits.rate_per_address, self.limits.burst_per_address)
        self._held: Counter[str] = Counter()
        """Connections of each address."""

    def arrive(self, number: int, address: str, now: float) -> int | None:
        """Adds a connection. Returns the one that is closed for it, which may be itself; it has left by then."""
        self.peers[number] = _Peer(address, now)
        self._held[address] += 1
        unseated = [n for n, peer in self.peers.items() if peer.stage <= Stage.WAITING]
        if len(unseated) <= self.limits.waiting:
            return None
        victim = self._least([n for n in unseated if self.peers[n].stage is Stage.SILENT and n != number])
        victim = number if victim is None else victim
        self.leave(victim)
        return victim

    def speaks(self, number: int, now: float) -> None:
        """Its first bytes are there: `settle` gives it a seat."""
        self._enter(number, Stage.WAITING, now)

    def advance(self, number: int, stage: Stage, now: float) -> None:
        """A seated connection reached a later stage. One that left meanwhile is none."""
        if number in self.peers:
            self._enter(number, stage, now)

    def leave(self, number: int) -> None:
        if (peer := self.peers.pop(number, None)) is not None:
            self._held[peer.address] -= 1
            if not self._held[peer.address]:
                del self._held[peer.address]

    def settle(self, now: float) -> Settled:
        """Gives seats to those who wait, the first of the address that holds fewest first."""
        seated, closed, again = [], [], None
        skipped: set[str] = set()
        while (number := self._next(skipped)) is not None:
            peer = self.peers[number]
            victim, later = self._room(peer.address, now)
            if later is None and (wait := self._rates.take(peer.address, now)):
                later = now + wait
            if later is not None:
                skipped.add(peer.address)
                again = later if again is None else min(again, later)
                continue
            if victim is not None:
                closed.append(victim)
                self.leave(victim)
            self._enter(number, Stage.GREETING, now)
            seated.append(number)
        return Settled(seated, closed, again)

    def _next(self, skipped: set[str]) -> int | None:
        waiting = [n for n, peer in self.peers.items() if peer.stage is Stage.WAITING and peer.address not in skipped]
        return min(waiting, key=lambda n: (self._held[self.peers[n].address], self.peers[n].since), default=None)

    def _room(self, address: str, now: float) -> tuple[int | None, float | None]:
        """Who gives way for one of this address, if somebody must; and when it is worth asking again, if nobody can."""
        seated = [n for n, peer in self.peers.items() if peer.stage > Stage.WAITING]
        own = [n for n in seated if self.peers[n].address == address]
        among = own if len(own) >= self.limits.seats_per_address else seated
        if among is seated and len(seated) < self.limits.seats:
            return None, None
        movable = [n for n in among if self.peers[n].stage is not Stage.PROVEN]
        ripe = [n for n in movable if now - self.peers[n].since >= self.limits.grace]
        if (victim := self._least(ripe)) is not None:
            return victim, None
        first = min((self.peers[n].since for n in movable), default=now)
        return None, max(first + self.limits.grace, now + 0.01)

    def _least(self, numbers: Iterable[int]) -> int | None:
        """Who gives way: by the address that holds most, the earliest stage, the longest time in it."""

        def order(number: int) -> tuple[int, Stage, float]:
            peer = self.peers[number]
            return -self._held[peer.address], peer.stage, peer.since

        return min(numbers, key=order, default=None)

    def _enter(self, number: int, stage: Stage, now: float) -> None:
        self.peers[number].stage, self.peers[number].since = stage, now
