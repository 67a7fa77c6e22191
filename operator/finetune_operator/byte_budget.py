"""Bytes of request bodies that a server holds at a time, over all its connections."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """`async with budget.claim(size)`: waits until there is room, before anything is read.

    Large bodies take turns and leave `reserved` bytes to small ones, which therefore never wait for a large one.
    """

    def __init__(self, total: int, *, reserved: int, small: int) -> None:
        """`small`: bytes of the largest body that counts as small."""
        self._total, self._reserved, self._small = total, reserved, small
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self.used = 0

    @asynccontextmanager
    async def claim(self, size: int) -> AsyncIterator[None]:
        """`size`: bytes, at most the total less what is reserved."""
        if size <= self._small:
            await self._take(size, self._total)
        else:
            async with self._turn:
                await self._take(size, self._total - self._reserved)
        try:
            yield
        finally:
            self.used -= size
            self._freed.set()

    async def _take(self, size: int, limit: int) -> None:
        while self.used + size > limit:
            self._freed.clear()
            await self._freed.wait()
        self.used += size
