"""Which formats of data each method learns from, and what one of its examples is made of."""

from collections.abc import Sequence
from typing import Literal

from finetune_api.dataset import Dataset

Kind = Literal["Tokens", "Pairs", "Unpaired", "Classes", "Prompts"]
"""What an example is: one sequence; a chosen and a rejected one; one with a verdict; one with a class; a prompt."""

SEQUENCES = ("Messages", "PromptCompletion", "Instruction", "Text")
ACCEPTED: dict[str, tuple[str, ...]] = {
    "SFT": (*SEQUENCES, "Labelled"),
    "DPO": ("Preference",),
    "KTO": ("Preference",),
    "ORPO": ("Preference",),
    "Reward": ("Preference",),
    "PPO": ("PromptOnly",),
    "GRPO": ("PromptOnly",),
}
"""By method. KTO takes both layouts of Preference: chosen and rejected, or a completion and whether it is good."""
_KINDS: dict[str, Kind] = {
    "DPO": "Pairs",
    "KTO": "Unpaired",
    "ORPO": "Pairs",
    "Reward": "Pairs",
    "PPO": "Prompts",
    "GRPO": "Prompts",
}


def kind_of(method: str, datasets: Sequence[Dataset]) -> Kind:
    """`SFT` on Labelled data learns classes; elsewhere the method decides."""
    if method == "SFT":
        return "Classes" if any(dataset.format == "Labelled" for dataset in datasets) else "Tokens"
    return _KINDS[method]


def formats_of(method: str, kind: Kind) -> tuple[str, ...]:
    """The formats that examples of this kind are read from; `Auto` chooses among them."""
    if method == "SFT":
        return ("Labelled",) if kind == "Classes" else SEQUENCES
    return ACCEPTED[method]
