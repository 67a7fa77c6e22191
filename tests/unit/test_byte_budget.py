"""Bytes of bodies that are held at a time: large bodies take turns, small ones never wait for a large one."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from finetune_operator.byte_budget import ByteBudget


def budget() -> ByteBudget:
    return ByteBudget(100, reserved=20, small=5)


async def test_what_fits_is_claimed_at_once_and_given_back() -> None:
    bytes_ = budget()
    async with bytes_.claim(50), bytes_.claim(30), bytes_.claim(5):
        assert bytes_.used == 85
    assert bytes_.used == 0


async def test_small_bodies_never_wait_for_large_ones() -> None:
    bytes_ = budget()
    async with bytes_.claim(80):
        large = asyncio.create_task(hold(bytes_, 15, asyncio.Event()))
        await asyncio.sleep(0)
        async with AsyncExitStack() as stack, asyncio.timeout(5):
            for _ in range(4):
                await stack.enter_async_context(bytes_.claim(5))
            assert bytes_.used == 100
        assert not large.done()
        large.cancel()
    assert bytes_.used == 0


async def test_large_bodies_have_their_turn_before_later_ones_that_would_fit() -> None:
    bytes_, first_may_end = budget(), asyncio.Event()
    async with bytes_.claim(40):
        first = asyncio.create_task(hold(bytes_, 80, first_may_end))
        await asyncio.sleep(0)
        second = asyncio.create_task(hold(bytes_, 10, asyncio.Event()))
        await asyncio.sleep(0)
        assert bytes_.used == 40
    await until(bytes_, 80)
    first_may_end.set()
    await first
    await until(bytes_, 10)
    second.cancel()


async def test_who_gives_up_gives_back_and_lets_others_on() -> None:
    bytes_ = budget()
    with pytest.raises(TimeoutError):
        async with bytes_.claim(80), asyncio.timeout(0.01), bytes_.claim(60):
            raise AssertionError
    assert bytes_.used == 0
    async with asyncio.timeout(5), bytes_.claim(80):
        assert bytes_.used == 80


async def hold(bytes_: ByteBudget, size: int, end: asyncio.Event) -> None:
    async with bytes_.claim(size):
        await end.wait()


async def until(bytes_: ByteBudget, used: int) -> None:
    async with asyncio.timeout(5):
        while bytes_.used != used:  # noqa: ASYNC110
            await asyncio.sleep(0)
