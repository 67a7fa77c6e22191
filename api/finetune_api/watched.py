"""The figures that early stopping may watch: as users write them, and which way is better."""

import re
from typing import NamedTuple

from finetune_api.formats import Kind

_PREFERENCES = ("evalLoss", "rewardMargin", "preferenceAccuracy")
_REWARDS = ("meanReward", "kl")
FIGURES: dict[str, tuple[str, ...]] = {
    "SFT": ("evalLoss", "perplexity", "tokenAccuracy"),
    "DPO": _PREFERENCES,
    "KTO": _PREFERENCES,
    "ORPO": _PREFERENCES,
    "Reward": _PREFERENCES,
    "PPO": _REWARDS,
    "GRPO": _REWARDS,
}
"""What each method measures on the validation data while it trains."""
CLASSES = ("evalLoss", "accuracy", "precision", "recall", "f1")
"""The same of SFT on Labelled data."""
LOWER = ("evalLoss", "perplexity", "kl")
"""Figures that are better the lower they are; all others are better the higher."""
_OTHER_NAMES = {"rewardsmargins": "rewardMargin", "rewardsaccuracies": "preferenceAccuracy", "reward": "meanReward"}
"""TRL's names, without their signs."""


class Watched(NamedTuple):
    figure: str
    lower: bool
    """Whether lower is better."""


def figures_of(method: str, kind: Kind) -> tuple[str, ...]:
    return CLASSES if kind == "Classes" else FIGURES[method]


def watched(metric: str, method: str, kind: Kind) -> Watched | None:
    """The figure that a user's name stands for: eval_loss, evalLoss and loss are one; None for an unknown one."""
    allowed, name = figures_of(method, kind), _bare(metric)
    known = {_bare(figure): figure for figure in allowed} | {
        other: figure for other, figure in _OTHER_NAMES.items() if figure in allowed
    }
    if "preferenceAccuracy" in allowed:
        known["accuracy"] = "preferenceAccuracy"
    figure = known.get(name)
    return Watched(figure, figure in LOWER) if figure else None


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("eval")
