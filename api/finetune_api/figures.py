"""Names of figures: what is measured, on which split, before or after, over everything, of a dataset or of a slice.

evalLoss  evalLossBefore  evalLoss.tickets  evalLossBefore.tickets.de  testLoss  retentionLoss  sft/evalLoss@dpo
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from finetune_api.evaluation import EvaluationMetric

HeldOut = Literal["validation", "test", "retention"]
ANSWERS: dict[EvaluationMetric, tuple[str, ...]] = {
    "ExactMatch": ("exactMatch",),
    "F1": ("f1",),
    "Rouge": ("rouge1", "rouge2", "rougeL"),
    "Bleu": ("bleu",),
    "Chrf": ("chrf",),
    "Meteor": ("meteor",),
    "WinRate": ("winRate",),
}
"""What the metrics that compare answers give."""
CLASSES: dict[EvaluationMetric, tuple[str, ...]] = {
    "Accuracy": ("accuracy",),
    "Precision": ("precision",),
    "Recall": ("recall",),
    "F1": ("f1",),
}
"""What is measured of Labelled data."""
TRAINING = ("trainLoss", "trainSeconds", "trainTokens", "tokensPerSecond")
_ORDER = (
    *("loss", "evalLoss", "perplexity", "tokenAccuracy", "accuracy", "precision", "recall", "f1", "exactMatch"),
    *("rougeL", "rouge1", "rouge2", "bleu", "chrf", "meteor", "winRate"),
    *("rewardMargin", "preferenceAccuracy", "meanReward", "kl", "chosenReward", "rejectedReward"),
    *TRAINING,
)
"""Which figures travel first where not all can."""
_OF_A_STAGE = re.compile(r"([a-z0-9-]+)/(.+)", re.DOTALL)
_AFTER_A_STAGE = re.compile(r"([^.@]+)@([a-z0-9-]+)$")
_SPLITS: tuple[HeldOut, ...] = ("validation", "test", "retention")


class Figure(NamedTuple):
    base: str
    """As it is called on the validation data."""
    split: HeldOut = "validation"
    before: bool = False
    dataset: str = ""
    slice: str = ""
    stage: str = ""
    """Whose data it is of."""
    after: str = ""
    """The later stage after which it was measured."""


def name_of(base: str, split: HeldOut = "validation", before: bool = False) -> str:
    """`evalLoss` -> `testLossBefore`; what follows a dot (`evalLoss.tickets`) stays behind it."""
    figure, dot, rest = base.partition(".")
    if split != "validation":
        figure = split + ("Loss" if figure == "evalLoss" else figure[:1].upper() + figure[1:])
    return figure + ("Before" if before else "") + dot + rest


def parse(name: str) -> Figure:
    """The inverse of `name_of`, for any text."""
    # The name of a slice comes from the data: it may hold anything, a slash or an @ too.
    stage, after, rest = "", "", name
    if found := _OF_A_STAGE.match(name):
        stage, rest = found[1], found[2]
        if found := _AFTER_A_STAGE.match(rest):
            rest, after = found[1], found[2]
    figure, _, where = rest.partition(".")
    dataset, _, slice_ = where.partition(".")
    before = figure.endswith("Before") and figure != "Before"
    figure = figure.removesuffix("Before") if before else figure
    split: HeldOut = "validation"
    for prefix in ("test", "retention"):
        tail = figure.removeprefix(prefix)
        if tail != figure and tail[:1].isupper():
            split = prefix
            figure = "evalLoss" if tail == "Loss" else tail[:1].lower() + tail[1:]
    return Figure(figure, split, before, dataset, slice_, stage, after)


def ranked(names: Iterable[str]) -> list[str]:
    """The most telling first: over everything, then of datasets, then of slices; after training, then before it."""

    def key(name: str) -> tuple[int, bool, int, bool, int, str]:
        found = parse(name)
        depth = 2 if found.slice else 1 if found.dataset else 0
        place = _ORDER.index(found.base) if found.base in _ORDER else len(_ORDER)
        return depth, bool(found.stage), _SPLITS.index(found.split), found.before, place, name

    return sorted(names, key=key)


def foremost(metrics: Mapping[str, float], count: int) -> dict[str, float]:
    """At most `count` of them."""
    return {name: metrics[name] for name in ranked(metrics)[:count]}
