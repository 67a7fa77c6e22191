"""Elections over one lease, in a world whose clock the test turns."""

import asyncio
from copy import deepcopy
from typing import Any

import pytest

from finetune_operator.cluster import ApiError
from finetune_operator.leader import Election, Lost, Terms

TERMS = Terms(lease=15.0, renew=10.0, retry=0.0)
Object = dict[str, Any]


class Server:
    """A lease with resourceVersions, and a clock."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.now, self.version, self.down = 0.0, 0, False
        self.before_write: list[Object] = []
        """Writes of others that get there first."""

    def clock(self) -> float:
        return self.now

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        self._answer()
        assert (kind, namespace, name) == ("Lease", "system", "ft")
        return deepcopy(self.lease)

    async def create(self, manifest: Object) -> Object:
        self._answer()
        if self.lease is not None:
            raise ApiError(409, "AlreadyExists", "leases")
        return self._store(manifest)

    async def replace(self, manifest: Object) -> Object:
        self._answer()
        for other in self.before_write:
            self._store(other)
        self.before_write = []
        assert self.lease is not None
        if manifest["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "leases")
        return self._store(manifest)

    def election(self, identity: str, terms: Terms = TERMS) -> Election:
        return Election(self, "system", "ft", identity, terms, self.clock)

    def holder(self) -> str:
        assert self.lease is not None
        return str(self.lease["spec"]["holderIdentity"])

    def _answer(self) -> None:
        if self.down:
            raise ApiError(503, "ServiceUnavailable", "down")

    def _store(self, manifest: Object) -> Object:
        self.version += 1
        self.lease = deepcopy(manifest)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return deepcopy(self.lease)


async def waits(election: Election) -> bool:
    """Whether it does not win now, however often it looks."""
    task = asyncio.create_task(election.win())
    for _ in range(50):
        await asyncio.sleep(0)
    if task.done():
        return False
    task.cancel()
    return True


async def test_the_first_leads_and_the_second_waits_a_whole_lease_of_silence() -> None:
    server = Server()
    first, second = server.election("a"), server.election("b")
    await first.win()
    assert await waits(second)
    server.now = 14.9
    assert await waits(second)
    server.now = 15.1
    assert not await waits(second)
    assert server.holder() == "b"
    assert server.lease is not None
    assert server.lease["spec"]["leaseTransitions"] == 1
    with pytest.raises(Lost, match="could not be renewed for 10 s"):
        await first.keep()


async def test_a_renewal_seen_begins_the_wait_anew() -> None:
    server = Server()
    first, second = server.election("a"), server.election("b")
    await first.win()
    assert await waits(second)
    server.now = 9.0
    await first.win()  # Another renewal of its own.
    server.now = 10.0
    assert await waits(second)  # It sees the change now, at 10.
    server.now = 24.0
    assert await waits(second)
    server.now = 25.1
    assert not await waits(second)


async def test_who_is_given_the_lease_back_need_not_wait() -> None:
    server = Server()
    first, second = server.election("a"), server.election("b")
    await first.win()
    await second.give_up()
    assert server.holder() == "a"
    await first.give_up()
    assert server.holder() == ""
    assert not await waits(second)


async def test_of_two_that_write_at_once_one_wins() -> None:
    server = Server()
    first, second = server.election("a"), server.election("b")
    await first.win()
    assert await waits(second)
    server.now = 20.0
    assert server.lease is not None
    faster = deepcopy(server.lease)
    faster["spec"] |= {"holderIdentity": "c", "renewTime": "later"}
    server.before_write = [faster]
    assert await waits(second)
    assert server.holder() == "c"


async def test_a_server_that_is_away_ends_leadership_before_the_lease_is_over() -> None:
    server = Server()
    leader = server.election("a")
    await leader.win()
    server.down = True
    keeping = asyncio.create_task(leader.keep())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not keeping.done()
    server.now = 10.0
    with pytest.raises(Lost, match=r"could not be renewed for 10 s"):
        await keeping
