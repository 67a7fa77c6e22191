"""The order of rows where shards are streamed: chunk by chunk, and else as free as any other."""

import numpy as np
import pytest

from finetune_api.run import Shard
from finetune_trainer.batches import WINDOW, Examples, Ints, Plan, rows_of
from finetune_trainer.streaming import AT_ONCE, chunks_of


def shard(number: int, dataset: str = "a", tokens: int = 1000) -> Shard:
    return Shard(
        key=f"train/{number:05}.parquet",
        split="train",
        dataset=dataset,
        rows=10,
        tokens=tokens,
        trained_tokens=tokens,
        size=1,
        sha256="0" * 64,
    )


def make_plan(count: int, *, packing: bool = False, seed: int = 7, datasets: int = 1) -> Plan:
    """Two epochs over `count` chunks of 40 examples, which are of one data set after the other."""
    chunk = np.repeat(range(count), 40)
    lengths = np.random.default_rng(1).integers(4, 30, len(chunk))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(ends[-1], dtype=np.int32)
    examples = Examples(tokens, tokens, ends, chunk % datasets, lengths - 1, chunk)
    rows = rows_of(examples, packing, max_length=64, seed=seed)
    return Plan(rows, global_batch=4, weights=(None,) * datasets, seed=seed, epochs=2, max_steps=None)


def seen(plan: Plan) -> Ints:
    return np.concatenate([plan.step(step) for step in range(plan.total_steps)])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("datasets", [1, 2])
def test_every_row_comes_once_in_each_epoch(packing: bool, datasets: int) -> None:
    plan = make_plan(6, packing=packing, datasets=datasets)
    rows, size = seen(plan), len(plan.rows)
    # Rows are grouped by length among those of a window, which may reach over the end of an epoch.
    stream = plan.coming(0, 2 * size)
    for epoch in (stream[:size], stream[size:]):
        assert sorted(epoch.tolist()) == list(range(size))
    assert set(rows.tolist()) == set(range(size))
    assert stream[:size].tolist() != stream[size:].tolist()


def test_a_chunk_is_over_before_the_next_one_begins() -> None:
    plan = make_plan(6)
    assert plan.rows.chunk is not None
    chunks = plan.rows.chunk[plan.coming(0, 480)]
    changes = int((np.diff(chunks) != 0).sum())
    # Twelve visits: six chunks in each of two epochs; the last of the first may be the first of the second.
    assert changes in (10, 11)
    first, second = (list(dict.fromkeys(half.tolist())) for half in (chunks[:240], chunks[240:]))
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second


def test_no_packed_row_reaches_over_two_chunks() -> None:
    plan = make_plan(6, packing=True)
    rows = plan.rows
    assert rows.chunk is not None
    assert len(rows) < 6 * 40
    for row in range(len(rows)):
        assert {int(member) // 40 for member in rows.examples(row)} == {int(rows.chunk[row])}


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_share_the_same_steps_whatever_their_number(world_size: int, micro: int) -> None:
    plan, alone = make_plan(5), make_plan(5)
    for step in (0, 3, WINDOW, plan.total_steps - 1):
        parts = [plan.micro_steps(step, rank, world_size, micro) for rank in range(world_size)]
        assert sorted(np.concatenate([ids for part in parts for ids in part])) == sorted(alone.step(step))


def test_a_resumed_run_continues_the_same_order() -> None:
    whole, resumed = make_plan(5, datasets=2), make_plan(5, datasets=2)
    middle = whole.total_steps // 2
    later = [whole.step(step).tolist() for step in range(whole.total_steps)][middle:]
    assert [resumed.step(step).tolist() for step in range(middle, resumed.total_steps)] == later
    other = make_plan(5, datasets=2, seed=8)
    assert later != [other.step(step).tolist() for step in range(middle, other.total_steps)]


def test_what_comes_is_what_the_steps_take() -> None:
    plan = make_plan(5)
    for step in (0, WINDOW + 3):
        window = plan.window_of(step) * WINDOW
        taken = np.concatenate([plan.step(s) for s in range(window, window + WINDOW)])
        assert sorted(plan.coming(step, 4 * WINDOW)) == sorted(taken)


def test_chunks_are_of_one_data_set_and_fit() -> None:
    found = [shard(i, "a") for i in range(20)] + [shard(20 + i, "b", 500) for i in range(7)]
    cache = AT_ONCE * 2 * 8 * 3000
    chunks = chunks_of(found, cache)
    assert sorted(number for members in chunks for number in members) == list(range(27))
    for members in chunks:
        assert len({found[number].dataset for number in members}) == 1
        assert sum(found[number].decoded_bytes for number in members) <= 8 * 3000
    # As many as fit, and not the neighbours: shards keep the order of the files.
    assert sorted(map(len, chunks)) == [1, 2, *[3] * 6, 6]
    assert chunks != [sorted(members) for members in chunks]
    assert chunks == chunks_of(found, cache)


def test_a_shard_larger_than_a_chunk_should_be_is_one() -> None:
    assert sorted(chunks_of([shard(i) for i in range(3)], 1)) == [[0], [1], [2]]
