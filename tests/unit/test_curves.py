"""What the curves of a run say: tables of histories."""

import math
import random
from collections.abc import Sequence

import pytest

from finetune_api.training import EarlyStopping
from finetune_api.watched import Watched
from finetune_trainer.curves import (
    IN_A_ROW,
    Best,
    best_of,
    diverged,
    evaluates_at,
    key_of,
    overfits_since,
    overfitting,
    stops,
    suspicious,
)

LOSS = Watched("evalLoss", lower=True)


def evaluated(values: Sequence[float], train: Sequence[float] | None = None) -> list[dict[str, float]]:
    """Evaluations every tenth step, with a training loss of their own."""
    losses = train or [1.0] * len(values)
    return [
        {"step": 10.0 * (i + 1), "loss": loss, "eval_loss": value}
        for i, (value, loss) in enumerate(zip(values, losses, strict=True))
    ]


def trained(losses: Sequence[float]) -> list[dict[str, float]]:
    return [{"step": float(i + 1), "loss": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("total", "every", "stopping", "steps"),
    [
        (100, 0, False, []),
        (100, 30, False, [30, 60, 90]),
        (100, 30, True, [30, 60, 90, 100]),
        (100, 0, True, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (25, 0, True, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]),
        (4, 0, True, [1, 2, 3, 4]),
    ],
)
def test_when_is_evaluated(total: int, every: int, stopping: bool, steps: list[int]) -> None:
    assert [step for step in range(1, total + 1) if evaluates_at(step, total, every, stopping)] == steps


@pytest.mark.parametrize(
    ("figure", "key"),
    [("evalLoss", "eval_loss"), ("perplexity", "eval_perplexity"), ("rewardMargin", "eval_reward_margin")],
)
def test_names_in_the_history(figure: str, key: str) -> None:
    assert key_of(figure) == key


@pytest.mark.parametrize(
    ("values", "min_delta", "best"),
    [
        ([], 0.0, None),
        ([2.0], 0.0, Best(10, 2.0, 0)),
        ([2.0, 1.5, 1.2], 0.0, Best(30, 1.2, 0)),
        ([2.0, 1.5, 1.6, 1.7], 0.0, Best(20, 1.5, 2)),
        ([2.0, 1.5, 1.5], 0.0, Best(20, 1.5, 1)),
        ([2.0, 1.95, 1.92], 0.1, Best(10, 2.0, 2)),
        ([2.0, 1.95, 1.85], 0.1, Best(30, 1.85, 0)),
    ],
)
def test_the_best_of_what_was_evaluated(values: list[float], min_delta: float, best: Best | None) -> None:
    assert best_of(evaluated(values), LOSS, min_delta) == best


def test_more_is_better_for_other_figures() -> None:
    history = [{"step": float(i), "eval_reward_margin": value} for i, value in enumerate([0.1, 0.4, 0.3, 0.2])]
    best = best_of(history, Watched("rewardMargin", lower=False), 0.0)
    assert best == Best(1, 0.4, 2)
    assert stops(best, EarlyStopping(patience=2))
    assert not stops(best, EarlyStopping(patience=3))
    assert not stops(None, EarlyStopping(patience=1))


FALLS = [2.0, 1.5, 1.0, 0.8, 0.6, 0.5]


@pytest.mark.parametrize(
    ("validation", "train", "since"),
    [
        pytest.param([2.0, 1.6, 1.4, 1.6, 1.8, 2.0], FALLS, 30, id="memorises"),
        pytest.param([2.0, 1.6, 1.4, 1.45, 1.5], FALLS[:5], 30, id="slowly"),
        pytest.param([1.4, 1.6, 1.8], FALLS[:3], 10, id="from the first one on"),
        pytest.param([2.0, 1.6, 1.4, 1.3, 1.25, 1.2], FALLS, None, id="learns"),
        pytest.param([2.0, 1.6, 1.40, 1.41, 1.40, 1.41], FALLS, None, id="flat with noise"),
        pytest.param([2.0, 1.6, 1.4, 1.6, 1.35, 1.3], FALLS, None, id="one bad evaluation"),
        pytest.param([2.0, 1.6, 1.4, 1.7, 1.5], FALLS[:5], None, id="recovers"),
        pytest.param([2.0, 1.6, 1.4, 1.6], FALLS[:4], None, id="one rise is not yet a trend"),
        pytest.param([2.0, 1.6, 1.4, 1.6, 1.8], [2.0, 1.5, 1.0, 1.4, 1.8], None, id="both rise"),
        pytest.param([2.0, 1.8], FALLS[:2], None, id="too few"),
        pytest.param([], [], None, id="none"),
    ],
)
def test_over_fitting(validation: list[float], train: list[float], since: int | None) -> None:
    history = evaluated(validation, train)
    assert overfits_since(history) == since
    assert overfitting(history) == ("" if since is None else f"training falls, validation rises since step {since}")


def test_the_training_loss_between_evaluations_counts() -> None:
    """A last batch that happens to be hard hides nothing."""
    history: list[dict[str, float]] = []
    for i, validation in enumerate([1.5, 1.2, 1.4, 1.6]):
        history += [{"step": 5.0 * (2 * i + 1), "loss": 2.0 - 0.5 * i}, {"step": 10.0 * (i + 1), "loss": 1.9}]
        history[-1]["eval_loss"] = validation
    assert overfits_since(history) == 20


def noise(seed: int, level: Sequence[float], spread: float) -> list[float]:
    rng = random.Random(seed)
    return [value * math.exp(rng.gauss(0, spread)) for value in level]


DECAY = [0.5 + 2 * math.exp(-i / 40) for i in range(200)]


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(DECAY, id="smooth"),
        pytest.param(noise(1, DECAY, 0.3), id="noisy"),
        pytest.param(noise(2, DECAY, 0.6), id="very noisy"),
        pytest.param([0.2 if i % 3 else 4.0 for i in range(200)], id="two tasks of other difficulty"),
        pytest.param([*DECAY[:100], 9.0, 9.0, 9.0, *DECAY[100:]], id="a few bad batches"),
        pytest.param(
            [0.69 * math.exp(-i / 10) + (0.6 if i % 7 == 0 else 0) for i in range(200)], id="preferences near 0"
        ),
        pytest.param([0.69, *[0.001] * 100, *[0.5] * 20], id="from almost nothing to little"),
        pytest.param([2.0 + 0.01 * i for i in range(100)], id="rises slowly"),
        pytest.param([3.0, *[0.4] * 60, *[2.0] * 30], id="back to where it began"),
        pytest.param([2.0, *[9.0] * 20], id="an easy first batch"),
        pytest.param([2.0, 9.0, 9.0, 9.0], id="too short to tell"),
    ],
)
def test_curves_that_are_fine(losses: list[float]) -> None:
    history = trained(losses)
    assert not any(diverged(history[: i + 1], warmup_steps=5) for i in range(len(history)))


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        pytest.param([*DECAY[:100], *[11.0] * 20], 105, id="breaks out"),
        pytest.param([*noise(3, DECAY, 0.3)[:100], *noise(4, [12.0] * 20, 0.1)], 105, id="breaks out of noise"),
        pytest.param([*DECAY[:50], *(DECAY[49] * 1.5**i for i in range(20))], None, id="grows"),
        pytest.param([2.5] * 8 + [40.0 * 2**i for i in range(12)], 13, id="early"),
        pytest.param([5.7, 5.6, 4.2, *(32.0 * 2**i for i in range(12))], 8, id="before there is a median"),
    ],
)
def test_a_loss_that_explodes(losses: list[float], at: int | None) -> None:
    history = trained(losses)
    found = [i + 1 for i in range(len(history)) if diverged(history[: i + 1], warmup_steps=5)]
    assert found
    assert at is None or found[0] == at


def test_a_warm_up_is_let_through() -> None:
    history = trained([2.0] * 6 + [50.0] * IN_A_ROW)
    assert suspicious(history) == IN_A_ROW
    assert diverged(history, warmup_steps=10)
    assert not diverged(history, warmup_steps=11)
    assert not diverged([], warmup_steps=0)


def test_a_loss_that_came_back_is_no_longer_suspicious() -> None:
    assert suspicious(trained([*DECAY[:100], 11.0, 11.0])) == 2
    assert suspicious(trained([*DECAY[:100], 11.0, 11.0, DECAY[100]])) == 0
