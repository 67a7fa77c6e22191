"""Which rows make up which step: by rank, by epoch, by weight, packed and not."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_trainer.batches import IGNORED, WINDOW, Examples, Plan, by_temperature, collate, pack, rows_of, shares


def make_examples(lengths: list[int], datasets: list[int] | None = None) -> Examples:
    """Tokens count up; the first half of each example carries no loss."""
    ends = np.cumsum([0, *lengths])
    ids = np.arange(1, ends[-1] + 1, dtype=np.int32)
    labels = ids.copy()
    for start, length in zip(ends, lengths, strict=False):
        labels[start : start + length // 2] = IGNORED
    return Examples(ids, labels, ends, np.array(datasets or [0] * len(lengths), dtype=np.int64))


def make_plan(
    examples: Examples,
    *,
    global_batch: int = 4,
    weights: tuple[float | None, ...] = (None,),
    epochs: float | None = None,
    max_steps: int | None = None,
    seed: int = 7,
) -> Plan:
    rows = rows_of(examples, packing=False, max_length=64, seed=seed)
    return Plan(rows, global_batch=global_batch, weights=weights, seed=seed, epochs=epochs, max_steps=max_steps)


def seen(plan: Plan) -> list[int]:
    return [int(row) for step in range(plan.total_steps) for row in plan.step(step)]


def test_one_epoch_shows_each_row_once() -> None:
    plan = make_plan(make_examples([5] * 200), epochs=1)
    assert plan.total_steps == 50
    assert sorted(seen(plan)) == list(range(200))


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "steps"),
    [(200, 4, 1.0, 50), (201, 4, 1.0, 51), (200, 4, 0.5, 25), (3, 16, 1.0, 1), (200, 16, 3.0, 38), (10, 4, None, 3)],
)
def test_epochs_in_steps(examples: int, batch: int, epochs: float | None, steps: int) -> None:
    assert make_plan(make_examples([5] * examples), global_batch=batch, epochs=epochs).total_steps == steps


def test_epochs_are_permuted_anew_and_nothing_is_left_out() -> None:
    plan = make_plan(make_examples([5] * 96), epochs=2)
    rows = seen(plan)
    assert sorted(rows[:96] + rows[96:]) == sorted([*range(96), *range(96)])
    assert rows[:96] != rows[96:]


def test_the_same_seed_gives_the_same_steps_in_any_order() -> None:
    lengths = list(range(3, 60)) * 5
    one, two = (make_plan(make_examples(lengths), epochs=2) for _ in range(2))
    forwards = [one.step(step).tolist() for step in range(one.total_steps)]
    backwards = [two.step(step).tolist() for step in reversed(range(two.total_steps))]
    assert forwards == backwards[::-1]
    assert forwards[0] != make_plan(make_examples(lengths), epochs=2, seed=8).step(0).tolist()


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_ranks_share_a_step_whatever_their_number(world_size: int, micro: int) -> None:
    plan = make_plan(make_examples(list(range(3, 67))), global_batch=8, epochs=1)
    for step in range(plan.total_steps):
        parts = [plan.micro_steps(step, rank, world_size, micro) for rank in range(world_size)]
        assert {len(part) for part in parts} == {8 // (world_size * micro)}
        rows = [int(row) for part in parts for ids in part for row in ids]
        assert sorted(rows) == sorted(plan.step(step).tolist())


def test_neighbours_have_like_lengths() -> None:
    lengths = np.random.default_rng(0).integers(4, 400, size=4 * WINDOW * 8).tolist()
    plan = make_plan(make_examples(lengths), epochs=1)
    spread = [np.ptp(plan.rows.lengths[plan.step(step)]) for step in range(plan.total_steps)]
    assert np.mean(spread) < 0.2 * np.ptp(lengths)
    sizes = [plan.rows.lengths[plan.step(step)].max() for step in range(WINDOW)]
    assert sizes != sorted(sizes), "long batches must not all come first"


def test_weights_are_shares_of_the_mix() -> None:
    examples = make_examples([5] * 400, [0] * 300 + [1] * 100)
    plan = make_plan(examples, global_batch=8, weights=(1, 3), epochs=2)
    datasets = examples.dataset[seen(plan)]
    assert np.bincount(datasets).tolist() == [200, 600]
    rows, counts = np.unique([row for row in seen(plan) if row >= 300], return_counts=True)
    assert len(rows) == 100, "a small dataset is gone through whole"
    assert set(counts.tolist()) == {6}, "before any row is seen again"


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([30, 10], [None, None], [30, 10]),
        ([30, 10], [1, 1], [20, 20]),
        ([30, 10], [0.7, 0.3], [28, 12]),
        ([30, 10], [3, None], [30, 10]),
        ([1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ([10, 0], [1, 5], [10, 0]),
    ],
)
def test_shares(sizes: list[int], weights: list[float | None], expected: list[int]) -> None:
    assert shares(sizes, weights) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(32, 64))
def test_packing_places_each_example_once_and_never_overflows(lengths: list[int], capacity: int) -> None:
    rows = pack(np.arange(len(lengths)), np.array(lengths), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= capacity for row in rows)
    # Best-fit never leaves two rows that would go into one.
    totals = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(totals) < 2 or totals[0] + totals[1] > capacity


def test_packing_keeps_datasets_and_tokens_apart() -> None:
    examples = make_examples([10, 20, 30, 5, 5, 40, 9], [0, 0, 0, 1, 1, 1, 1])
    rows = rows_of(examples, packing=True, max_length=64, seed=3)
    assert sorted(rows.members.tolist()) == list(range(7))
    for row in range(len(rows)):
        members = rows.examples(row)
        assert set(examples.dataset[members]) == {rows.dataset[row]}
        assert rows.lengths[row] == examples.lengths[members].sum()
        assert rows.trained[row] == examples.trained()[members].sum()


def test_learned_tokens_leave_out_what_nothing_predicts() -> None:
    ids = np.arange(7, dtype=np.int32)
    labels = np.array([0, 1, 2, IGNORED, 4, 5, 6], dtype=np.int32)
    examples = Examples(ids, labels, np.array([0, 3, 6, 7]), np.zeros(3, dtype=np.int64))
    assert examples.trained().tolist() == [2, 2, 0]
    batch = collate(examples, [np.array([0, 1, 2])], packed=True)
    assert int((batch["labels"][:, 1:] != IGNORED).sum()) == 4


def test_collation() -> None:
    examples = make_examples([3, 2, 9])
    batch = collate(examples, [np.array([0, 1]), np.array([2])], packed=True)
    assert batch["input_ids"].tolist()[0] == [1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert batch["labels"].tolist()[0][:6] == [IGNORED, 2, 3, IGNORED, 5, IGNORED]
    assert batch["position_ids"].tolist()[0][:8] == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch["position_ids"].tolist()[1][:10] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]
    assert "attention_mask" not in batch
    flat = collate(examples, [np.array([0, 1]), np.array([2])], packed=True, flat=True)
    assert {name: tensor.shape for name, tensor in flat.items()} == dict.fromkeys(batch, (1, 32))
    assert flat["position_ids"].flatten().tolist() == batch["position_ids"].flatten().tolist()
    assert "position_ids" not in collate(examples, [np.array([0])], packed=False)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, [900, 100]), (2.0, [750, 250]), (100.0, [506, 494])])
def test_temperature_evens_the_shares(temperature: float, expected: list[int]) -> None:
    assert shares([900, 100], by_temperature([900, 100], temperature)) == pytest.approx(expected, abs=1)


def test_several_steps_take_the_same_rows_where_a_method_learns_from_its_own_answers() -> None:
    rows = rows_of(make_examples([5] * 40), False, 64, 0)
    plan: dict[str, Any] = {"global_batch": 4, "weights": [None], "seed": 1}
    one = Plan(rows, epochs=2, max_steps=None, **plan)
    three = Plan(rows, epochs=2, max_steps=None, repeats=3, **plan)
    assert three.total_steps == 3 * one.total_steps == 60
    assert [three.step(step).tolist() for step in range(60)] == [one.step(step // 3).tolist() for step in range(60)]
    assert three.epoch_at(60) == one.epoch_at(20) == 2
    assert Plan(rows, epochs=None, max_steps=7, repeats=3, **plan).total_steps == 7
