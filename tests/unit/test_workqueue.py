"""The queue in virtual time, and its workers in real."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.workqueue import Schedule, WorkQueue


def schedule() -> Schedule[str]:
    return Schedule(base=1.0, longest=60.0, jitter=lambda: 1.0)


def test_often_in_a_row_is_once() -> None:
    queue = schedule()
    for key in "abab":
        queue.add(key)
    assert [queue.take(0), queue.take(0), queue.take(0)] == ["a", "b", None]


def test_one_worker_for_each_key_and_news_meanwhile_is_not_lost() -> None:
    queue = schedule()
    queue.add("a")
    assert queue.take(0) == "a"
    queue.add("a")
    queue.add("a")
    assert queue.take(0) is None
    queue.done("a", 0)
    assert queue.take(0) == "a"
    queue.done("a", 0)
    assert queue.take(0) is None


def test_failures_pause_longer_and_longer_and_success_forgets_them() -> None:
    queue, now, pauses = schedule(), 0.0, []
    queue.add("a")
    for _ in range(8):
        assert queue.take(now) == "a"
        pause = queue.done("a", now, failed=True)
        assert pause is not None
        assert queue.take(now + pause - 0.01) is None
        pauses.append(pause)
        now += pause
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert queue.take(now) == "a"
    queue.done("a", now)
    queue.add("a")
    queue.take(now)
    assert queue.done("a", now, failed=True) == 1


def test_jitter_is_applied() -> None:
    queue: Schedule[str] = Schedule(base=2.0, jitter=lambda: 1.2)
    queue.add("a")
    queue.take(0)
    assert queue.done("a", 0, failed=True) == pytest.approx(2.4)


def test_the_earliest_date_counts_and_being_looked_at_clears_it() -> None:
    queue = schedule()
    queue.add_at("a", 50)
    queue.add_at("a", 20)
    queue.add_at("a", 90)
    assert queue.next_due() == 20
    assert queue.take(19) is None
    assert queue.take(20) == "a"
    queue.done("a", 20)
    assert queue.next_due() is None
    queue.add_at("b", 100)
    queue.add("b")
    assert queue.take(30) == "b"
    queue.done("b", 30, after=5)
    assert queue.next_due() == 35


@given(st.lists(st.tuples(st.sampled_from(["add", "later", "take", "done", "fail"]), st.sampled_from("abc"))))
def test_no_key_is_lost_or_worked_on_twice_at_once(steps: list[tuple[str, str]]) -> None:
    queue, now = schedule(), 0.0
    working: set[str] = set()
    owed: set[str] = set()
    for step, key in steps:
        now += 0.5
        if step == "add":
            queue.add(key)
            owed.add(key)
        elif step == "later":
            queue.add_at(key, now + 3)
            owed.add(key)
        elif step == "take":
            taken = queue.take(now)
            if taken is not None:
                assert taken not in working
                working.add(taken)
                owed.discard(taken)
        elif key in working:
            working.discard(key)
            queue.done(key, now, failed=step == "fail")
            owed |= {key} if step == "fail" else set()
    for key in working:
        queue.done(key, now)
    found = set()
    while (key_ := queue.take(now + 1000)) is not None:
        found.add(key_)
        queue.done(key_, now + 1000)
    assert owed <= found


async def test_workers_share_the_keys_and_survive_a_failure() -> None:
    seen: list[str] = []
    failures: list[str] = []
    done = asyncio.Event()

    async def work(key: str) -> float | None:
        seen.append(key)
        await asyncio.sleep(0)
        if key == "bad" and seen.count("bad") == 1:
            raise ValueError(key)
        if len(set(seen)) == 21 and seen.count("again") == 2:
            done.set()
        return 0.01 if key == "again" and seen.count("again") == 1 else None

    queue = WorkQueue(work, on_failure=lambda key, error: failures.append(key))
    running = asyncio.create_task(queue.run(4))
    for key in ["bad", "again", *map(str, range(19))]:
        queue.add(key)
    await asyncio.wait_for(done.wait(), 5)
    assert failures == ["bad"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_groups_are_served_in_turn() -> None:
    queue: Schedule[tuple[str, int]] = Schedule(group=lambda key: key[0])
    for key in [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1), ("b", 2)]:
        queue.add(key)
    assert [queue.take(0) for _ in range(6)] == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("a", 3)]


def test_a_group_never_has_all_workers() -> None:
    queue: Schedule[tuple[str, int]] = Schedule(group=lambda key: key[0], most=2)
    for number in range(4):
        queue.add(("a", number))
    assert [queue.take(0) for _ in range(3)] == [("a", 0), ("a", 1), None]
    queue.add(("b", 0))
    assert [queue.take(0), queue.take(0)] == [("b", 0), None]
    assert len(queue) == 5
    queue.done(("a", 1), 0)
    assert [queue.take(0), queue.take(0)] == [("a", 2), None]


async def test_keys_that_are_added_all_the_time_keep_nobody_waiting() -> None:
    """Each look at one of the first group's puts it on the queue again."""
    looked: list[tuple[str, int]] = []
    busy, served = asyncio.Event(), asyncio.Event()

    async def work(key: tuple[str, int]) -> None:
        looked.append(key)
        await asyncio.sleep(0)
        if key[0] == "busy":
            queue.add(key)
            if len(looked) > 100:
                busy.set()
        else:
            served.set()

    queue: WorkQueue[tuple[str, int]] = WorkQueue(work, group=lambda key: key[0], most=3)
    for number in range(16):
        queue.add(("busy", number))
    task = asyncio.create_task(queue.run(4))
    await asyncio.wait_for(busy.wait(), 10)
    before = len(looked)
    queue.add(("quiet", 0))
    await asyncio.wait_for(served.wait(), 10)
    assert len(looked) - before < 20
    task.cancel()
    await asyncio.wait({task}, timeout=10)
    assert task.done()


@pytest.mark.parametrize("ticks", range(4))
async def test_it_ends_where_news_come_as_it_is_cancelled(ticks: int) -> None:
    async def work(key: str) -> None:
        await asyncio.sleep(0)

    queue: WorkQueue[str] = WorkQueue(work)
    queue.add_after("later", 3600)
    task = asyncio.create_task(queue.run(4))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    for _ in range(ticks):
        await asyncio.sleep(0)
    queue.add("now")
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done, "it goes on though it was cancelled"
