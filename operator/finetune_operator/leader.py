"""Which of several operators acts: the one that holds a Lease, in the way of client-go's leader election.

Clocks of different machines are never compared: a holder is given up when its record has not changed for a whole lease
by the clock of the one who looks on.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from finetune_operator.cluster import ApiError

logger = logging.getLogger("finetune_operator.leader")
Object = dict[str, Any]


class Leases(Protocol):
    """What of a cluster an election needs; methods raise ApiError."""

    async def get(self, kind: str, namespace: str | None, name: str) -> Object | None: ...

    async def create(self, manifest: Object) -> Object: ...

    async def replace(self, manifest: Object) -> Object:
        """Writes the object where its resourceVersion is still the current one, else ApiError says Conflict."""


class Terms(NamedTuple):
    """Seconds. The holder gives up before others may take over, and tries several times before that."""

    lease: float
    renew: float
    """The holder stops acting when it could not renew for so long."""
    retry: float


class Lost(Exception):
    """The lease is held by another, or could not be renewed in time."""


class Election:
    """`win` it, then `keep` it; `give_up` when stopping, so that the next one need not wait."""

    def __init__(
        self,
        leases: Leases,
        namespace: str,
        name: str,
        identity: str,
        terms: Terms,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leases, self._namespace, self._name = leases, namespace, name
        self.identity, self._terms, self._clock = identity, terms, clock
        self._seen: tuple[Object, float] | None = None
        """The holder's record as it was seen last, and since when it has been that."""
        self._renewed = 0.0

    async def win(self) -> None:
        """Returns when the lease is this one's. An API server that does not answer is asked again."""
        while True:
            try:
                if await self._try():
                    logger.info("%s leads", self.identity)
                    return
            except ApiError as error:
                logger.warning("the lease %s/%s cannot be had: %s", self._namespace, self._name, error)
            await asyncio.sleep(self._terms.retry)

    async def keep(self) -> None:
        """Renews until that is not possible any more. Raises Lost."""
        while True:
            await asyncio.sleep(self._terms.retry)
            left = self._renewed + self._terms.renew - self._clock()
            if left <= 0:
                raise Lost(f"the lease could not be renewed for {self._terms.renew:g} s")
            try:
                async with asyncio.timeout(left):
                    held = await self._try()
            except (ApiError, TimeoutError) as error:
                logger.warning("the lease was not renewed: %s", error or "the API server does not answer")
                continue
            if not held:
                raise Lost(f"the lease is held by {self._holder()}")

    async def give_up(self) -> None:
        """Only where it is held; a failure costs the next one the rest of the lease."""
        if self._seen is None or self._holder() != self.identity:
            return
        try:
            async with asyncio.timeout(self._terms.retry):
                await self._write(self._seen[0], "")
        except (ApiError, TimeoutError) as error:
            logger.warning("the lease was not given back: %s", error or "the API server does not answer")

    async def _try(self) -> bool:
        """One look, and a write where the lease is this one's to take. Raises ApiError."""
        asked = self._clock()
        lease = await self._leases.get("Lease", self._namespace, self._name)
        if lease is None:
            return await self._attempt(self._leases.create(self._manifest({}, self.identity, 0)), asked)
        if self._seen is None or self._seen[0].get("spec") != lease.get("spec"):
            self._seen = lease, asked
        else:
            self._seen = lease, self._seen[1]
        holder = self._holder()
        if holder not in ("", self.identity) and asked < self._seen[1] + self._duration(lease):
            return False
        return await self._attempt(self._write(lease, self.identity), asked)

    async def _attempt(self, write: Any, asked: float) -> bool:
        try:
            self._seen = await write, asked
        except ApiError as error:
            if error.status == 409:  # another was faster
                return False
            raise
        self._renewed = asked
        return True

    async def _write(self, lease: Object, holder: str) -> Object:
        changes = int((lease.get("spec") or {}).get("leaseTransitions") or 0)
        if holder and self._holder() != holder:
            changes += 1
        return await self._leases.replace(self._manifest(lease["metadata"], holder, changes))

    def _manifest(self, metadata: Object, holder: str, transitions: int) -> Object:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = {"leaseDurationSeconds": max(1, round(self._terms.lease)), "leaseTransitions": transitions}
        held = {"holderIdentity": holder, "acquireTime": now, "renewTime": now}
        if holder and self._seen and self._holder() == holder:
            held["acquireTime"] = self._seen[0]["spec"].get("acquireTime", now)
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"namespace": self._namespace, "name": self._name} | metadata,
            "spec": spec | held,
        }

    def _holder(self) -> str:
        return str((self._seen[0].get("spec") or {}).get("holderIdentity") or "") if self._seen else ""

    def _duration(self, lease: Object) -> float:
        """As its holder promised, which may be another version of this program."""
        return float((lease.get("spec") or {}).get("leaseDurationSeconds") or self._terms.lease)
