"""What follows from the figures: stopping, what counts as sound, and how a divergence is told."""

from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.failures import FineTuneError, Reason
from finetune_trainer.control import Control
from support.runs import make_run_config

NAN = float("nan")
EXPLODED = [2.0] * 20 + [50.0] * 5


def control(history: list[dict[str, float]], scaled: bool = False, **spec: Any) -> Control:
    step = int(history[-1]["step"]) if history else 0
    journal: Any = SimpleNamespace(history=history, step=step)
    return Control(make_run_config(**spec).spec, journal, 100, scaled, held_out="validation" in spec)


def losses(values: list[float]) -> list[dict[str, float]]:
    return [{"step": float(i + 1), "loss": value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("figures", "scaled", "words"),
    [
        ({"loss": NAN}, False, "the training loss is not a number at step 3 of 100; a lower training.learningRate"),
        ({"loss": float("inf")}, True, "the training loss is not a number"),
        ({"loss": 1.0, "grad_norm": NAN}, False, "the norm of the gradients is not a number"),
        ({"loss": 1.0, "grad_norm": float("inf")}, False, "the norm of the gradients is not a number"),
    ],
)
def test_what_is_not_a_number_ends_the_job(figures: dict[str, float], scaled: bool, words: str) -> None:
    with pytest.raises(FineTuneError) as caught:
        control(losses([1.0] * 3), scaled).check(figures)
    assert caught.value.reason == Reason.DIVERGED
    assert words in str(caught.value)


def test_gradients_in_float16_may_overflow() -> None:
    control(losses([1.0] * 3), scaled=True).check({"loss": 1.0, "grad_norm": float("inf")})


def test_a_loss_that_explodes_ends_the_job() -> None:
    exploded = control(losses(EXPLODED))
    assert not exploded.is_sound
    with pytest.raises(FineTuneError, match=r"has risen from 2 to 50 and stays at step 25 of 100"):
        exploded.check({"loss": 50.0})
    # Three bad batches end nothing, but what is saved then is not to replace what was good.
    some = control(losses(EXPLODED[:23]))
    some.check({"loss": 50.0})
    assert not some.is_sound


@pytest.mark.parametrize("method", ["PPO", "GRPO"])
def test_a_loss_without_a_scale_is_not_judged(method: str) -> None:
    rl = control(losses([-0.001] * 20 + [0.5] * 9), method={"type": method})
    rl.check({"loss": 0.5})
    assert rl.is_sound


def test_early_stopping_needs_validation_data_and_counts_evaluations() -> None:
    values = [2.0, 1.0, 1.2, 1.3]
    history = [{"step": float(25 * (i + 1)), "loss": 1.0, "eval_loss": value} for i, value in enumerate(values)]
    training = {"earlyStopping": {"patience": 2}}
    watched = control(history, training=training, validation={"fraction": 0.1})
    assert watched.best
    assert (watched.best.step, watched.stops, watched.stopped_early) == (50, True, False)
    assert not control(history[:3], training=training, validation={"fraction": 0.1}).stops
    alone = control(history, training=training)
    assert (alone.best, alone.stops, alone.evaluates(10)) == (None, False, False)
