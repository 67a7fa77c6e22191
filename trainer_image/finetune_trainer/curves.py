"""What the figures of a run say so far: which evaluation was the best, and what goes wrong. Pure functions.

A history has one entry for each logged step: `step`, `loss` and, where it was evaluated, `eval_loss` and the like.
"""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import NamedTuple

from finetune_api.training import EarlyStopping
from finetune_api.watched import Watched

Entry = Mapping[str, float]
History = Sequence[Entry]

FACTOR = 3.0
"""A loss this many times the median of the recent ones is suspicious,"""
START_FACTOR = 1.5
"""where it is also this many times the first step's, which no update had changed: a loss near zero may well leap."""
RECENT = 50
"""Logged losses that the median is of."""
LEAST = 5
"""Logged losses that are normal whatever they are."""
IN_A_ROW = 5
"""Suspicious losses one after the other that are a divergence: single ones come of single batches."""
RISE = 0.02
"""Share by which the validation loss must exceed its best: less is noise."""
EVALUATIONS = 2
"""Evaluations one after the other that must do so."""


def evaluates_at(step: int, total: int, every: int, stopping: bool) -> bool:
    """Whether the validation data are evaluated after this step (1 …): every so many; 0: ten times to stop early.

    Who stops early judges the last step, too: it may be the best.
    """
    if every:
        return step % every == 0 or (stopping and step == total)
    return stopping and step * 10 // total > (step - 1) * 10 // total


def key_of(figure: str) -> str:
    """A validation figure's name in a history: evalLoss is eval_loss there, rewardMargin eval_reward_margin."""
    return "eval_" + re.sub(r"(?<!^)([A-Z])", r"_\1", figure).lower().removeprefix("eval_")


class Best(NamedTuple):
    step: int
    value: float
    waited: int
    """Evaluations since then, none of which was better."""


def best_of(history: History, watched: Watched, min_delta: float) -> Best | None:
    """The best evaluation so far: one that is better by less than `min_delta` is not."""
    key, best = key_of(watched.figure), None
    for entry in history:
        if key not in entry:
            continue
        value = entry[key]
        if best is None or (best.value - value if watched.lower else value - best.value) > min_delta:
            best = Best(int(entry["step"]), value, 0)
        else:
            best = best._replace(waited=best.waited + 1)
    return best


def stops(best: Best | None, stopping: EarlyStopping) -> bool:
    return best is not None and best.waited >= stopping.patience


def suspicious(history: History) -> int:
    """How many of the newest losses, one after the other, are far above what was normal before them."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not losses:
        return 0
    normal: list[float] = []
    found = 0
    for loss in losses[-4 * RECENT :]:
        high = bool(normal) and loss > max(FACTOR * median(normal[-RECENT:]), START_FACTOR * losses[0])
        found = found + 1 if high else 0
        # The first one alone may be of an easy batch: a few are normal whatever they are.
        if not high or len(normal) < LEAST:
            normal.append(loss)
    return found


def diverged(history: History, warmup_steps: int) -> bool:
    """Whether the loss has left what was normal, and stays away."""
    return bool(history) and history[-1]["step"] > warmup_steps and suspicious(history) >= IN_A_ROW


def overfits_since(history: History) -> int | None:
    """The step from which on the training loss falls and the validation loss rises; None where that is not so.

    The step is that of the lowest validation loss. The newest ones after it must all be above, by more than noise, and
    not on their way down again; the training loss must have been lower before the last one than before the lowest.
    """
    places = [place for place, entry in enumerate(history) if "eval_loss" in entry]
    values = [history[place]["eval_loss"] for place in places]
    if len(values) <= EVALUATIONS:
        return None
    lowest = values.index(min(values))
    after = values[lowest + 1 :]
    bound = values[lowest] + RISE * abs(values[lowest])
    if len(after) < EVALUATIONS or min(after[-EVALUATIONS:]) <= bound or after[-1] < after[-2]:
        return None
    before = [place + 1 for place in (-1, *places)]
    first, last = (
        fmean(entry["loss"] for entry in history[before[i] : before[i + 1]]) for i in (lowest, len(places) - 1)
    )
    return int(history[places[lowest]]["step"]) if last < first else None


def overfitting(history: History) -> str:
    """In words; empty where nothing is wrong."""
    since = overfits_since(history)
    return "" if since is None else f"training falls, validation rises since step {since}"
